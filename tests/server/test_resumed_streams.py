"""A stream cut behind any chunk goes on at another server, and its client cannot tell; token ids make it possible."""

import json
from contextlib import ExitStack

import httpx
import pytest
from checkpoints import VOCABULARY, save_checkpoint, save_reciting, save_tokenizer
from serving import within

from sagellm.server.config import ServerConfig

pytest_plugins = ["checkpoints"]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"model": "m", "messages": [{"role": "user", "content": "Tell me"}], "max_tokens": 16, "temperature": 0}
ONCE = {"model": "m", "prompt": "The fox", "max_tokens": 16, "temperature": 0}
DRAWN = {"temperature": 1.1, "seed": 3, "presence_penalty": 0.5}
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
PIECES = ["<think>", "Rain?", " Sun", "</think>", "So: ", "<tool_call>", '{"name": "weather", ',
          '"arguments": {"city": ', '"Oslo"}}', "</tool_call>", "!"]  # fmt: skip
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>{# <think> #}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def two_servers(folder):
    stack, config = ExitStack(), ServerConfig(port=0, served_model_name="m")
    return stack, [stack.enter_context(within(folder, config, max_sequences=4)) for _ in range(2)]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    save_tokenizer(folder)
    save_checkpoint(folder, "Qwen2ForCausalLM", eos_token_id=0)
    stack, servers = two_servers(folder)
    with stack:
        yield servers


@pytest.fixture(scope="module")
def reciting_model(tmp_path_factory):
    """Thinks, says something, calls a tool and says something more."""
    folder = tmp_path_factory.mktemp("reciting")
    save_reciting(folder, "".join(PIECES), save_tokenizer(folder, VOCABULARY - len(PIECES), PIECES, TEMPLATE))
    stack, servers = two_servers(folder)
    with stack:
        yield servers


def streamed(address, path, body):
    more = {"stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", address + path, json=body | more, timeout=60) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]", lines
    return [json.loads(line) for line in lines[:-1]]


def tokens_of(chunks):
    return [token for chunk in chunks for choice in chunk["choices"] for token in choice["token_ids"]]


def told(chunks):
    """All that a client makes of them."""
    made = {"text": "", "role": "", "content": "", "reasoning_content": "", "calls": [], "logprobs": []}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        delta = choice.get("delta", {})
        made["text"] += choice.get("text", "")
        for name in ("role", "content", "reasoning_content"):
            made[name] += delta.get(name) or ""
        made["calls"] += [(call["index"], call["function"]) for call in delta.get("tool_calls", ())]
        logprobs = choice["logprobs"] or {}
        made["logprobs"] += logprobs.get("content") or []
        names = ("tokens", "text_offset", "token_logprobs")
        made["logprobs"] += zip(*(logprobs.get(name, ()) for name in names))
        made["reason"] = choice["finish_reason"]
    usage = chunks[-1].get("usage") or {}
    return made | {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


def nearly(value):
    """Logprobs of a prefill are those of a decode up to rounding."""
    if isinstance(value, float):
        return round(value, 2) + 0.0
    if isinstance(value, dict):
        return {name: nearly(one) for name, one in value.items()}
    return [nearly(one) for one in value] if isinstance(value, (list, tuple)) else value


def cut_at_many_places(servers, path, body, most=6):
    """The uninterrupted stream, once so many ways to cut it have been seen to give the same."""
    here, there = servers
    chunks = streamed(here, path, body)
    ids, last = tokens_of(chunks), len(chunks) - 1
    for cut in sorted({1, 2, last, *range(1, last, -(-last // most))}):
        first = chunks[:cut]
        brought = tokens_of(first)
        rest = streamed(there, path, body | {"resume_token_ids": brought})
        assert nearly(told(first + rest)) == nearly(told(chunks)), cut
        assert brought + tokens_of(rest) == ids
    return chunks


FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
CASES = {
    "plain": (CHAT, HI),
    "drawn": (CHAT, HI | DRAWN | {"logprobs": True, "top_logprobs": 2}),
    "a schema": (CHAT, HI | DRAWN | {"max_tokens": 40, "response_format": FORM}),
    "text": (TEXT, ONCE | DRAWN),
    "an echo with logprobs": (TEXT, ONCE | {"echo": True, "logprobs": 2}),
    "a regex": (TEXT, ONCE | DRAWN | {"guided_regex": "[a-z]{3} é[0-9]{2}中"}),
}


@pytest.mark.parametrize(("path", "body"), CASES.values(), ids=list(CASES))
def test_a_stream_goes_on_at_another_server(random_model, path, body):
    chunks = cut_at_many_places(random_model, path, body)
    assert len(tokens_of(chunks)) == chunks[-1]["usage"]["completion_tokens"] > 5


@pytest.mark.parametrize(("path", "body"), [(CHAT, HI), (TEXT, ONCE | {"echo": True})], ids=["chat", "text"])
def test_a_stop_string_that_was_begun_goes_on(random_model, path, body):
    body = body | {"ignore_eos": True}
    made = told(streamed(random_model[0], path, body))
    text = made["content"] or made["text"].removeprefix("The fox")
    met = told(cut_at_many_places(random_model, path, body | {"stop": [text[6:9], "\0"]}))
    assert (met["content"] or met["text"].removeprefix("The fox")) == text[: text.index(text[6:9])]
    cut_at_many_places(random_model, path, body | {"stop": text[6:9] + "\0"})


def test_reasoning_and_a_call_go_on_from_their_midst(reciting_model):
    chunks = cut_at_many_places(reciting_model, CHAT, HI | {"tools": TOOLS, "max_tokens": 30}, most=20)
    made = told(chunks)
    assert (made["role"], made["reasoning_content"], made["content"]) == ("assistant", "Rain? Sun", "So: !")
    ((index, call),) = made["calls"]
    assert (index, call["name"], json.loads(call["arguments"])) == (0, "weather", {"city": "Oslo"})
    assert made["reason"] == "tool_calls"
    silent = [
        c for c in chunks if c["choices"] and c["choices"][0]["token_ids"] and not c["choices"][0]["delta"]
    ]
    assert len(silent) >= 5, "a token that shows nothing yet has its chunk"


@pytest.mark.parametrize("model", ["random_model", "reciting_model"])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_whole_answer_has_its_tokens_and_may_go_on_too(request, model, path):
    here, there = request.getfixturevalue(model)
    body = (HI if path == CHAT else ONCE) | {"return_token_ids": True, "logprobs": path == CHAT or 1}
    whole = httpx.post(here + path, json=body, timeout=60).json()
    (choice,) = whole["choices"]
    chunks = streamed(here, path, body)
    first = chunks[0]
    prompt = (whole if path == CHAT else choice)["prompt_token_ids"]
    assert (first if path == CHAT else first["choices"][0])["prompt_token_ids"] == prompt
    assert not any("prompt_token_ids" in text for text in map(json.dumps, chunks[1:]))
    assert len(prompt) == whole["usage"]["prompt_tokens"]
    assert len(choice["token_ids"]) == whole["usage"]["completion_tokens"]
    assert tokens_of(chunks) == choice["token_ids"]
    again = httpx.post(
        there + path, json=body | {"resume_token_ids": choice["token_ids"][:4]}, timeout=60
    ).json()
    (other,) = again["choices"]
    for name in ("message", "text", "token_ids", "finish_reason", "stop_reason"):
        assert other.get(name) == choice.get(name)
    assert again["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for name in ("content", "tokens", "text_offset"):
        if name in choice["logprobs"]:
            assert nearly(other["logprobs"][name]) == nearly(choice["logprobs"][name][4:])
    plain = httpx.post(here + path, json=body | {"return_token_ids": None}, timeout=60).text
    assert "token_ids" not in plain


@pytest.mark.parametrize(
    ("path", "more", "message"),
    [
        (CHAT, {"n": 2}, "resume_token_ids: accepted: only with n = 1"),
        (TEXT, {"prompt_logprobs": 1}, "resume_token_ids: accepted: only without prompt_logprobs"),
        (TEXT, {"prompt": ["a", "b"]}, "resume_token_ids: accepted: only with one prompt"),
        (TEXT, {"echo": True, "logprobs": 1}, "with echo and logprobs only in a stream"),
        (CHAT, {"resume_token_ids": [2**20]}, "token id 1048576 in resume"),
        (CHAT, {"resume_token_ids": [-1]}, "resume_token_ids.0 is -1"),
        (CHAT, {"resume_token_ids": [5] * (2**20 + 1)}, "resume_token_ids is "),
        (CHAT, {"resume_token_ids": [5] * 17}, "resume has 17 tokens; accepted: at most max_tokens"),
        (CHAT, {"resume_token_ids": [0, 5]}, "resume goes on behind token 0"),
        (TEXT, {"guided_regex": "[0-9]", "resume_token_ids": [40]}, "resume is not of the grammar"),
    ],
    ids=str,
)
def test_what_cannot_be_gone_on_with_is_refused(random_model, path, more, message):
    body = (HI if path == CHAT else ONCE) | {"resume_token_ids": [5]} | more
    for stream in [False] if "echo" in more else [False, True]:
        answer = httpx.post(random_model[0] + path, json=body | {"stream": stream}, timeout=60)
        assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text[:300]
