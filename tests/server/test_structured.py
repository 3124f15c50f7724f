"""Answers that look as they were asked to, by every way to ask for it, as the official client sees them."""

import json
import re

import openai
import pytest
from checkpoints import VOCABULARY, save_checkpoint, save_tokenizer
from pydantic import BaseModel
from serving import within

from sagellm.server.config import ServerConfig

pytest_plugins = ["checkpoints"]

HI = [{"role": "user", "content": "Tell me"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
ASK = {"model": "m", "messages": HI, "max_tokens": 120, "temperature": 1.0, "seed": 5}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{# MARK #}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}<|end|>{% endfor %}<|assistant|>"
    "{% if open %}<think>{% endif %}"
)
MARKS = {
    "hermes": ["<tool_call>", "</tool_call>"],
    "deepseek": ["<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"],
    "llama": ["<|python_tag|>"],
}


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "additionalProperties": False}
    parameters["required"] = list(properties)
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("weather", city={"enum": ["Oslo", "Rome"]}), tool("now")]


@pytest.fixture(scope="module", params=["hermes", "deepseek", "llama"])
def client(request, tmp_path_factory):
    """Random models: whatever is right in their answers was forced upon them. Hermes' model reasons, too."""
    form = request.param
    folder = tmp_path_factory.mktemp(form)
    pieces = [*MARKS[form], "<think>", "</think>"]
    reasons = "{# <think> #}" if form == "hermes" else ""
    template = TEMPLATE.replace("MARK", MARKS[form][0]) + reasons
    if form != "hermes":
        template = template.replace("<think>", "")
    save_tokenizer(folder, VOCABULARY - len(pieces), pieces, template)
    save_checkpoint(folder, "LlamaForCausalLM", eos_token_id=0, max_position_embeddings=1024)
    with (
        within(folder, ServerConfig(port=0, served_model_name="m")) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client,
    ):
        client.form = form
        yield client


def said(client, **more):
    return client.chat.completions.create(**ASK | more).choices[0]


WAYS = [
    ({"response_format": {"type": "json_object"}}, None),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}, SCHEMA),
    ({"extra_body": {"guided_json": SCHEMA}}, SCHEMA),
    ({"extra_body": {"guided_json": json.dumps(SCHEMA)}}, SCHEMA),
    ({"extra_body": {"structured_outputs": {"json": SCHEMA}}}, SCHEMA),
    ({"extra_body": {"structured_outputs": {"json_object": True}}}, None),
    ({"extra_body": {"guided_regex": "[a-c]{3}-[0-9]{2}"}}, "[a-c]{3}-[0-9]{2}"),
    ({"extra_body": {"structured_outputs": {"regex": "[a-c]{3}"}}}, "[a-c]{3}"),
    ({"extra_body": {"guided_choice": ["yes", "no"]}}, "yes|no"),
    ({"extra_body": {"guided_grammar": 'root ::= "<" [a-z] ">"'}}, "<[a-z]>"),
    ({"extra_body": {"guided_grammar": 'start: "<" /[a-z]/ ">"'}}, "<[a-z]>"),
]


@pytest.mark.parametrize(("how", "wanted"), WAYS, ids=lambda value: str(value)[:60])
def test_answers_are_of_what_was_asked_for(client, how, wanted):
    choice = said(client, **how)
    if choice.finish_reason == "length":  # a random model's object may have no end
        assert wanted is None or client.form == "hermes"
        return
    assert choice.finish_reason == "stop"
    if isinstance(wanted, str):
        assert re.fullmatch(wanted, choice.message.content)
    else:
        value = json.loads(choice.message.content)
        assert isinstance(value, dict) and (wanted is None or set(value) == {"city", "warm"})


def test_the_client_parses_into_its_own_class(client):
    class Answer(BaseModel):
        warm: bool
        city: str

    if client.form == "hermes":
        pytest.skip("reasoning of a random model may have no end")
    schema = {**SCHEMA, "type": "object"}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    assert Answer.model_validate_json(said(client, response_format=form).message.content)


def test_completions_have_it_too(client):
    made = client.completions.create(
        model="m", prompt="x", max_tokens=50, n=3, extra_body={"guided_regex": "[0-9]{4}"}
    )
    assert all(re.fullmatch("[0-9]{4}", choice.text) for choice in made.choices)


def forced(client, choice, stream=False, **more):
    """The calls of an answer whose reasoning ends; of a stream, put together."""
    for seed in range(40):
        asked = ASK | {"tools": TOOLS, "tool_choice": choice, "seed": seed, "max_tokens": 200} | more
        if not stream:
            one = client.chat.completions.create(**asked).choices[0]
            calls, reason = one.message.tool_calls or [], one.finish_reason
        else:
            chunks = [c.choices[0] for c in client.chat.completions.create(stream=True, **asked)]
            calls = [call for c in chunks for call in c.delta.tool_calls or []]
            reason = next(c.finish_reason for c in chunks if c.finish_reason)
        if reason == "tool_calls":
            return calls
        assert reason == "length"
    raise AssertionError("no answer has an end")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_can_be_forced(client, stream):
    calls = forced(client, "required", stream)
    assert calls and {call.function.name for call in calls} <= {"weather", "now"}
    named = {"type": "function", "function": {"name": "weather"}}
    calls = forced(client, named, stream, parallel_tool_calls=False)
    (call,) = calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.json_schema"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_regex": "a" * 20_000}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"not": {}}}, "guided_json"),
        ({"guided_grammar": "start: ??"}, "guided_grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_json": {"type": "integer", "multipleOf": 99991}}, "guided_json"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend"),
        ({"tool_choice": "required"}, None),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
        ),
        ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
        ({"tools": [tool("a", b={"not": {}})], "tool_choice": "required"}, "tools"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_promised_is_refused_by_name(client, more, param):
    with pytest.raises(openai.BadRequestError) as refused:
        said(client, extra_body=more)
    assert (refused.value.param or "").startswith(param or "")
