"""What nobody should send: the server refuses it, says why, and is as it was before."""

import json
import os
import random

import httpx
import psutil
import pytest
import schemathesis
from checkpoints import save_checkpoint, save_tokenizer
from hypothesis import given, settings
from hypothesis.errors import Unsatisfiable
from serving import within
from strategies import EXAMPLES

from sagellm.server.config import ServerConfig

pytest_plugins = ["checkpoints"]

CASES = int(os.environ.get(EXAMPLES, "250"))
"""Of all operations together."""
POSTS = ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"]
MIB = 2**20


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    save_tokenizer(folder)
    save_checkpoint(folder, "Qwen2ForCausalLM", eos_token_id=0, num_hidden_layers=1)
    config = ServerConfig(port=0, served_model_name="m", debug_routes=True)
    with within(folder, config, max_length=64, explain_steps=8) as address:
        yield address


def works(address):
    body = {"model": "m", "prompt": "x", "max_tokens": 3, "ignore_eos": True}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
    return answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3


def test_no_request_that_the_schema_allows_or_forbids_fails_inside(served):
    """Random requests by /openapi.json, right and wrong ones, to every operation."""
    address = served
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    wide = sum(bool(o.body or o.query or o.path_parameters) for o in operations)
    each = -(-CASES // (wide * len(modes)))  # the others have one request each
    counts = {}
    for operation in operations:
        for mode in modes:
            try:
                strategy = operation.as_strategy(generation_mode=mode)
            except Exception as error:  # an operation without parameters has no wrong ones
                assert mode is schemathesis.GenerationMode.NEGATIVE, error
                continue

            @settings(max_examples=each, database=None)
            @given(case=strategy)
            def send(case):
                if isinstance(case.body, dict) and "model" in case.body and len(repr(case.body)) % 4:
                    case.body["model"] = "m"  # else few get behind the model's name
                answer = case.call(base_url=address, timeout=60)
                counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
                assert answer.status_code < 500, (answer.status_code, answer.text[:300])

            try:
                send()
            except Unsatisfiable:
                assert mode is schemathesis.GenerationMode.NEGATIVE
    print(f"schemathesis: {sum(counts.values())} requests, by status: {counts}")
    assert counts.get(200, 0) > 0 and counts.get(400, 0) > 0
    assert works(address)


def bodies():
    """Raw bodies, each wrong in some way."""
    deep = 10_000
    good = {"model": "m", "prompt": "x", "messages": [{"role": "user", "content": "x"}], "input": "x"}
    yield from (
        b"",
        b"\x00",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"{}",
        b"1e999",
        b"\xff\xfe{\x00}\x00",
        b"\x1f\x8b" * 100,
    )
    yield from (b"[" * deep, b'{"a":' * deep, b'{"model":' + b"[" * deep + b"]" * deep + b"}")
    yield json.dumps(good).encode()[:-3]
    yield json.dumps(good | {"temperature": 1.0}).replace("1.0", "NaN").encode()
    yield json.dumps(good | {"top_p": 1.0}).replace("1.0", "-Infinity").encode()
    yield json.dumps(good | {"max_tokens": 1}).replace(": 1}", ": 1" + "0" * 5000 + "}").encode()
    for text in ("\ud800", "\udfff" * 1000, "a\ud83d", "\x00" * 1000, "\u202e\ufeff\U0010ffff"):
        for field in ("prompt", "input", "stop", "user"):
            yield json.dumps(good | {field: text}).encode()
        yield json.dumps(good | {"messages": [{"role": "user", "content": text}]}).encode()
        yield json.dumps(good | {"guided_regex": text, "max_tokens": 2}).encode()
        yield json.dumps(good | {"guided_choice": [text], "max_tokens": 2}).encode()
        yield json.dumps(good | {"guided_json": {"const": text}, "max_tokens": 2}).encode()
    for value in (None, True, -1, 1.5, "x", [], {}, [[]], [{}], 2**70, -(2**70), [None], {"a": {"b": []}}):
        for field in ("model", "prompt", "messages", "input", "max_tokens", "n", "stop", "seed", "logit_bias",
                      "tools", "response_format", "stream_options", "tokens"):  # fmt: skip
            yield json.dumps(good | {"max_tokens": 2} | {field: value}).encode()
    draw = random.Random(0)
    whole = json.dumps(good | {"max_tokens": 2, "n": 2, "stop": ["a"], "logit_bias": {"5": 1.5}}).encode()
    for _ in range(60):
        broken = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        yield bytes(broken)


def test_raw_bodies_do_not_harm_and_leave_nothing_behind(served):
    address = served
    memory, headers = psutil.Process(), {"Content-Type": "application/json"}
    some = list(bodies())
    with httpx.Client(base_url=address, timeout=60, headers=headers) as client:
        for turn in range(2):
            for i, body in enumerate(some if turn else some[::3]):
                answer = client.post(POSTS[i % len(POSTS)], content=body)
                assert answer.status_code < 500, (body[:200], answer.text[:300])
                assert answer.status_code == 200 or answer.json()["error"]["message"]
                assert "Traceback" not in answer.text and "site-packages" not in answer.text
            if turn == 0:
                before = memory.memory_info().rss
        large = b'{"model":"m","prompt":"' + b"x" * 10 * MIB + b'"}'
        for path in POSTS:
            assert client.post(path, content=large).status_code == 413
            pieces = (large[at : at + MIB] for at in range(0, len(large), MIB))
            assert client.post(path, content=pieces).status_code == 413
        nearly = b'{"model":"m","prompt":"' + b"x" * 7 * MIB + b'"}'
        for path in POSTS[:4]:
            assert client.post(path, content=nearly).status_code == 400
    assert memory.memory_info().rss - before < 64 * MIB
    assert works(address)


def test_a_client_that_sends_half_a_request_holds_up_nobody(served):
    import socket

    address = served
    host, port = address.removeprefix("http://").split(":")
    held = [socket.create_connection((host, int(port))) for _ in range(50)]
    for one in held:
        one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert works(address)
    for one in held:
        one.close()
    assert works(address)
