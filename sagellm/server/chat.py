"""`/v1/chat/completions`: a conversation, and the next message of it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from attrs import define, field
from fastapi import Request

from sagellm.engine.base import GenerateRequest, GenerateResult, Output, TokenEvent
from sagellm.engine.engine import Stream
from sagellm.engine.tokenizer import Tokenizer
from sagellm.errors import UserError
from sagellm.server.errors import APIError
from sagellm.server.grammars import Asked, Calls, composed, grammar_of, marks_of
from sagellm.server.logprobs import of_chat
from sagellm.server.parsing import FORMS, THINK, Parser, Part, tool_call
from sagellm.server.sampling import sampling_params
from sagellm.server.state import ServerState
from sagellm.server.streams import as_they_come, finish_reason, open_streams, to_the_end, usage_of
from sagellm.server.types import ChatRequest, Function, Message, NamedTool, ToolCall


def template_message(message: Message) -> dict[str, Any]:
    """As chat templates want it: text as one string, absent fields left out."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    fields: dict[str, Any] = {"role": message.role, "content": content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            fields[name] = value
    if message.tool_calls:
        fields["tool_calls"] = [_as_template_call(call) for call in message.tool_calls]
    return fields


def _as_template_call(call: ToolCall) -> dict[str, Any]:
    """Templates write the arguments as JSON themselves, so they want the object."""
    try:
        arguments: Any = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


@define
class Chat:
    """One request on its way."""

    given: ChatRequest
    model: str
    tokenizer: Tokenizer
    tool_form: str | None
    """How the model marks its calls, see `parsing.FORMS`; None: it knows no tools."""
    id: str = field(factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(factory=lambda: int(time.time()))
    prompt: list[int] = field(factory=list)
    stream: Stream | None = None
    """The engine's, once it is open."""
    _thinking: bool = False
    _parsers: dict[int, Parser] = field(factory=dict)
    _begun: set[int] = field(factory=set)
    """Choices of which a chunk was sent."""

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """Those that the model is told of."""
        if not self.given.tools or self.given.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.given.tools]

    def _parser(self) -> Parser:
        form = FORMS[self.tool_form] if self.tools is not None and self.tool_form else None
        most = 1 if self.given.parallel_tool_calls is False else None
        return Parser(form, self._reasons, thinking=self._thinking, most=most)

    @property
    def _reasons(self) -> bool:
        return THINK in self.tokenizer.chat_template

    def grammar(self) -> Asked | None:
        """What the answer must look like, as `response_format` and `tool_choice` say. The prompt must be known."""
        given, asked = self.given, grammar_of(self.given)
        choice = given.tool_choice
        forced = choice == "required" or isinstance(choice, NamedTool)
        if asked is None and not forced:
            return None
        calls = None
        if self.tools is not None:
            if asked is not None and (forced or FORMS[self.tool_form].whole):
                why = (
                    "forces a call"
                    if forced
                    else "lets the model answer or call, which in its form look alike"
                )
                raise APIError(
                    400, f"tool_choice {why}; accepted: without {asked.field}", param="tool_choice"
                )
            calls = Calls(self.tool_form, self._callable(), given.parallel_tool_calls is not False)
        reasoning = self._thinking if self._reasons else None
        grammar = composed(asked.grammar if asked else None, calls, reasoning, marks_of(self.tokenizer))
        return Asked(asked.field if asked else "tools", grammar)

    def _callable(self) -> list[Function]:
        """The functions that may be called."""
        functions, choice = [tool.function for tool in self.given.tools], self.given.tool_choice
        if not isinstance(choice, NamedTool):
            return functions
        found = [f for f in functions if f.name == choice.function.name]
        if not found:
            names = ", ".join(f.name for f in functions)
            raise APIError(
                400,
                f"tool_choice.function.name is {choice.function.name!r}; accepted: {names}",
                param="tool_choice.function.name",
            )
        return found

    async def request(self, state: ServerState) -> GenerateRequest:
        given = self.given
        if self.tools is not None and self.tool_form is None:
            raise APIError(
                400, f"the chat template of {self.model!r} knows no tools; accepted: none", param="tools"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [template_message(m) for m in given.messages],
                add_generation_prompt=given.add_generation_prompt,
                tools=self.tools,
                **(given.chat_template_kwargs or {}),
            )
        except UserError as error:
            raise APIError(400, str(error), param="messages") from error
        self._thinking = text.rstrip().endswith(THINK)
        asked = self.grammar()
        if asked is not None:
            await state.check(asked.grammar, asked.field)
        prompt = self.prompt = self.tokenizer.encode(text, add_special_tokens=False)
        longest = state.ready().get_capability().max_sequence_length or len(prompt) + 1
        most = given.max_tokens if given.max_completion_tokens is None else given.max_completion_tokens
        how = sampling_params(
            given,
            state.defaults,
            max_tokens=max(1, longest - len(prompt)) if most is None else most,
            logprobs=(given.top_logprobs or 0) if given.logprobs else None,
            grammar=None if asked is None else asked.grammar,
        )
        return GenerateRequest(
            id=self.id,
            prompt=prompt,
            sampling=how,
            priority=given.priority,
            salt=given.cache_salt or "",
            resume=given.resume_token_ids or (),
        )

    def opened(self, stream: Stream) -> None:
        self.stream = stream
        if self.given.resume_token_ids is not None:
            self._parsers[0] = self._parser()
            list(self._parsers[0].push(stream.resumed))  # what the client has is read and not told again

    def whole(self, result: GenerateResult) -> dict[str, Any]:
        choices = [self._choice(i, output) for i, output in enumerate(result.outputs)]
        more = {} if result.prompt_logprobs is None else {"prompt_logprobs": result.prompt_logprobs}
        if self.given.return_token_ids:
            more["prompt_token_ids"] = self.prompt
        return self._object("chat.completion", choices) | {"usage": usage_of([result])} | more

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        parser = self._parser()
        parts = [*parser.push(output.text), *parser.finish()]
        content = "".join(part.content for part in parts)
        calls = [tool_call(part.call) for part in parts if part.call is not None]
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content.strip() or None, "tool_calls": calls}
        if reasoning := "".join(part.reasoning for part in parts):
            message["reasoning_content"] = reasoning
        fresh = output.token_ids[len(self.given.resume_token_ids or ()) :]
        choice = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(fresh, zip(output.logprobs, output.top_logprobs)),
            "finish_reason": self._reason(output.finish_reason, parser),
            "stop_reason": output.stopped_by,
        }
        return choice | ({"token_ids": list(output.token_ids)} if self.given.return_token_ids else {})

    @staticmethod
    def _reason(reason: str | None, parser: Parser) -> str | None:
        return "tool_calls" if reason == "stop" and parser.calls else finish_reason(reason)

    def _logprobs(self, tokens, pairs) -> dict[str, Any] | None:
        if not self.given.logprobs:
            return None
        return of_chat(self.tokenizer, tokens, pairs, self.given.top_logprobs or 0)

    def _object(self, kind: str, choices: list) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _chunk(
        self,
        index: int,
        delta: dict,
        ids: Sequence[int] = (),
        reason: str | None = None,
        logprobs: Any = None,
    ) -> dict:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = self._object("chat.completion.chunk", [choice])
        if self.given.return_token_ids:
            choice["token_ids"] = list(ids)
            if index not in self._begun:
                self._begun.add(index)
                chunk["prompt_token_ids"] = self.prompt
        return chunk

    def heads(self) -> Iterable[dict[str, Any]]:
        for index in range(self.given.n or 1 if self.given.resume_token_ids is None else 0):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def pieces(self, which: int, event: TokenEvent) -> Iterable[dict[str, Any]]:
        """One chunk at most, so that who has an event's tokens has all of its text too."""
        parser = self._parsers.setdefault(event.sample, self._parser())
        found, text = parser.calls, event.text
        told = not event.ids and event.finish_reason in ("stop", "length")
        if told:  # the answer had ended with what the client has of it
            text = self.stream.result.text[len(self.stream.resumed) :]
        parts = [*parser.push(text), *(parser.finish() if event.finish_reason else ())]
        delta = {} if told else self._delta(parts, found)
        logprobs = self._logprobs(event.ids, event.logprobs) if event.logprobs else None
        if delta or logprobs or event.finish_reason or self.given.return_token_ids:
            reason = self._reason(event.finish_reason, parser)
            yield self._chunk(event.sample, delta, event.ids, reason, logprobs)

    @staticmethod
    def _delta(parts: Sequence[Part], found: int) -> dict[str, Any]:
        """`found`: calls before these."""
        calls = [part.call for part in parts if part.call is not None]
        delta = {
            "reasoning_content": "".join(part.reasoning for part in parts),
            "content": "".join(part.content for part in parts),
            "tool_calls": [tool_call(call, index) for index, call in enumerate(calls, found)],
        }
        return {name: value for name, value in delta.items() if value}

    def tail(self, results: list[GenerateResult]) -> Iterable[dict[str, Any]]:
        if self.given.stream_options is not None and self.given.stream_options.include_usage:
            yield self._object("chat.completion.chunk", []) | {"usage": usage_of(results)}


async def chat(request: Request, state: ServerState, given: ChatRequest):
    engine = state.serving(given.model)
    job = Chat(given, state.model_name, state.tokenizer(), state.tool_form)
    streams = open_streams(engine, [await job.request(state)])
    job.opened(streams[0])
    if given.stream:
        return await as_they_come(request, streams, job.pieces, first=job.heads(), last=job.tail)
    (result,) = await to_the_end(request, streams)
    return job.whole(result)
