"""What clients may send: the OpenAI API's requests, each field bounded, and the further ones that users of vLLM know.

A field that is not here is refused by its name, as is one that is here to be refused: see `Refused`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_TEXT = 4 * 2**20
MAX_PROMPTS = 256
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_BIASES = 1024
MAX_GRAMMAR = 128 * 1024
MAX_RESUMED = 2**20

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Name = Annotated[str, StringConstraints(max_length=256)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(max_length=MAX_TEXT)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


def _refused(value: Any) -> Any:
    if value is not None:
        raise ValueError("this server does not support it")
    return value


Refused = Annotated[Any, AfterValidator(_refused)]
"""Known to the API and not to us: may be absent or null."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False


GrammarText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_GRAMMAR)]
Schema = dict[str, Any] | GrammarText
"""A JSON schema, as it is or as text."""
Choices = Annotated[
    list[Annotated[str, StringConstraints(min_length=1, max_length=4096)]], Field(min_length=1)
]


class JSONSchema(Strict):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class PlainFormat(Strict):
    type: Literal["text", "json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JSONSchema


class StructuredOutputs(Strict):
    json_: Schema | None = Field(None, alias="json")
    regex: GrammarText | None = None
    choice: Choices | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None


class Sampling(Strict):
    """How tokens are chosen, in any kind of request."""

    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Name, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_BIASES
    )
    user: Name | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    ignore_eos: bool = False
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    cache_salt: Name | None = None
    return_token_ids: bool | None = None
    resume_token_ids: Annotated[list[Token], Field(max_length=MAX_RESUMED)] | None = None
    """The client has these tokens of the answer, and all that came before the next one: only that is told."""
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: GrammarText | None = None
    guided_choice: Choices | None = None
    guided_grammar: GrammarText | None = None
    guided_decoding_backend: Refused = None
    guided_whitespace_pattern: Refused = None

    @model_validator(mode="after")
    def _check_resume(self) -> Sampling:
        if self.resume_token_ids is not None and (self.n or 1) > 1:
            raise ValueError("resume_token_ids: accepted: only with n = 1")
        if self.resume_token_ids is not None and self.prompt_logprobs is not None:
            raise ValueError("resume_token_ids: accepted: only without prompt_logprobs")
        return self


Prompts = (
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Tokens
    | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
)


def prompts_of(given: Any) -> list[str | list[int]]:
    """Of `Prompts`: one or several, each a text or token ids."""
    if isinstance(given, str) or not given or isinstance(given[0], int):
        return [given]
    return list(given)


class EmbeddingRequest(Strict):
    model: Name
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    pooling: Literal["mean", "last", "cls"] = "mean"
    normalize: bool = True
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    user: Name | None = None


class CompletionRequest(Sampling):
    model: Name
    prompt: Prompts
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    best_of: int | None = None
    suffix: Refused = None

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of not in (None, 1, self.n):
            raise ValueError("best_of: accepted: the same as n")
        if self.resume_token_ids is not None:
            if len(prompts_of(self.prompt)) > 1:
                raise ValueError("resume_token_ids: accepted: only with one prompt")
            if self.echo and self.logprobs is not None and not self.stream:
                raise ValueError("resume_token_ids: accepted: with echo and logprobs only in a stream")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class FunctionCall(Strict):
    name: Name
    arguments: Text


class ToolCall(Strict):
    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall


class Function(Strict):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=1024)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Name | None = None
    reasoning_content: Text | None = None
    refusal: Refused = None
    audio: Refused = None
    function_call: Refused = None

    @model_validator(mode="after")
    def _check(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content: a message of role {self.role!r} needs some")
        return self


TEMPLATE_NAMES = {
    "messages", "tools", "documents", "add_generation_prompt", "chat_template", "self", "raise_exception",
    "strftime_now",
}  # fmt: skip
"""Variables of a chat template that no request may set."""


class ChatRequest(Sampling):
    model: Name
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[Name, Any] | None = Field(None, max_length=16)
    metadata: dict[Name, Name] | None = Field(None, max_length=16)
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: Refused = None
    prediction: Refused = None
    web_search_options: Refused = None
    functions: Refused = None
    function_call: Refused = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Refused = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if taken := TEMPLATE_NAMES & set(self.chat_template_kwargs or ()):
            raise ValueError(
                f"chat_template_kwargs: accepted: without {sorted(taken)[0]}, which is the server's"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: accepted: only with logprobs")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice: accepted: only with tools")
        return self


class TokenizeRequest(Strict):
    model: Name | None = None
    prompt: Text
    add_special_tokens: bool = True


class DetokenizeRequest(Strict):
    model: Name | None = None
    tokens: Tokens
