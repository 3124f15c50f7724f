"""Calls of tools and reasoning, as the official client sees them, of a model that recites both."""

import json

import openai
import pytest
from checkpoints import VOCABULARY, save_reciting, save_tokenizer
from serving import within

from sagellm.server.config import ServerConfig

pytest_plugins = ["checkpoints"]

ARGUMENTS = '"arguments": {"city": "Oslo"}}'
PIECES = ["<think>", "Rain?", "</think>", "<tool_call>", '{"name": "weather", ', ARGUMENTS, "</tool_call>"]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}<|end|>{% endfor %}<|assistant|>"
    "{# <think> #}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
ASK = {"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 0, "max_tokens": 30}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    backend = save_tokenizer(folder, VOCABULARY - len(PIECES), PIECES, TEMPLATE)
    save_reciting(folder, "".join(PIECES), backend)
    with (
        within(folder, ServerConfig(port=0, served_model_name="m")) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client,
    ):
        yield client


def test_a_call_is_told_as_a_call(client):
    choice = client.chat.completions.create(tools=TOOLS, **ASK).choices[0]
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.reasoning_content == "Rain?"


def test_a_streamed_call_is_the_same(client):
    chunks = [c.choices[0] for c in client.chat.completions.create(tools=TOOLS, stream=True, **ASK)]
    calls = [call for c in chunks for call in c.delta.tool_calls or []]
    assert [(c.index, c.function.name) for c in calls] == [(0, "weather")]
    assert json.loads(calls[0].function.arguments) == {"city": "Oslo"}
    assert "".join(getattr(c.delta, "reasoning_content", None) or "" for c in chunks) == "Rain?"
    assert [c.finish_reason for c in chunks if c.finish_reason] == ["tool_calls"]


def test_without_tools_the_marks_are_text(client):
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = client.chat.completions.create(**ASK, **more).choices[0]
        assert choice.message.content == "".join(PIECES[3:]) and choice.finish_reason == "stop"


def test_a_conversation_goes_on_behind_the_result(client):
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
    ]
    made = client.chat.completions.create(tools=TOOLS, **ASK | {"messages": messages})
    assert made.usage.prompt_tokens > 10 and made.choices[0].message.tool_calls


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "no good"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        ({"tool_choice": "auto"}, None),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
    ],
)
def test_what_cannot_be_promised_is_refused(client, more, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASK, extra_body=more)
    assert refused.value.param == param
