"""Embeddings as the official client asks for them, and routes that explain, with the core in a process of its own."""

import base64

import httpx
import numpy as np
import openai
import pytest
from serving import within

from sagellm.engine.engine import SageLLMEngine
from sagellm.server.config import ServerConfig

KEY = "sk-x"
TEXTS = ["Once upon a time", "the end", "中文"]


@pytest.fixture(scope="module")
def address():
    config = ServerConfig(port=0, served_model_name="m", api_keys=(KEY,), debug_routes=True)
    settings = {"core": "process", "explain_steps": 64, "dtype": "float32", "max_batched_tokens": 512}
    with within("builtin", config, **settings) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def vectors():
    import asyncio

    with SageLLMEngine("builtin", dtype="float32") as engine:
        return {pooling: asyncio.run(engine.embed(TEXTS, pooling)) for pooling in ("mean", "last", "cls")}


def test_embeddings_are_those_of_the_engine(client, vectors):
    for how in ({}, {"encoding_format": "float"}, {"extra_body": {"pooling": "last"}}):
        made = client.embeddings.create(model="m", input=TEXTS, **how)
        want = vectors[how.get("extra_body", {}).get("pooling", "mean")]
        np.testing.assert_allclose([one.embedding for one in made.data], want, atol=1e-5)
        assert [one.index for one in made.data] == [0, 1, 2] and made.model == "m"
        assert made.usage.prompt_tokens == made.usage.total_tokens > 3


def test_inputs_are_texts_and_token_ids(client, address, vectors):
    asked = {"json": {"prompt": TEXTS[0]}, "headers": auth(), "timeout": 60}
    tokens = httpx.post(f"{address}/tokenize", **asked).json()["tokens"]
    for given in (TEXTS[0], [TEXTS[0]], tokens, [tokens]):
        (one,) = client.embeddings.create(model="m", input=given, encoding_format="float").data
        np.testing.assert_allclose(one.embedding, vectors["mean"][0], atol=1e-5)
    raw = client.embeddings.with_raw_response.create(model="m", input="x", encoding_format="base64").text
    assert '"embedding":"' in raw
    text = raw.split('"embedding":"')[1].split('"')[0]
    assert len(base64.b64decode(text)) == 4 * vectors["mean"].shape[1]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"dimensions": 7}, "dimensions"),
        ({"extra_body": {"pooling": "max"}}, "pooling"),
        ({"input": []}, None),
        ({"input": ""}, None),
        ({"input": [2] * 600}, None),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"extra_body": {"truncate": 5}}, "truncate"),
    ],
)
def test_what_cannot_be_embedded_is_refused(client, more, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(**{"model": "m", "input": "x"} | more)
    assert refused.value.param == param or (refused.value.param or "").startswith(param or "")


def auth():
    return {"Authorization": f"Bearer {KEY}"}


def debug(address, path):
    return httpx.get(f"{address}/debug/{path}", headers=auth(), timeout=60)


def test_steps_and_lookups_can_be_explained(client, address):
    messages = [{"role": "user", "content": "Tell me a long story about a fox and a dog. " * 4}]
    first, second = (
        client.chat.completions.create(model="m", messages=messages, max_tokens=6) for _ in range(2)
    )
    steps = debug(address, "steps?last=50").json()["steps"]
    assert steps[0]["number"] > steps[1]["number"] and any(second.id in step["requests"] for step in steps)
    assert {"plan_hit", "operations", "seconds", "device_seconds", "remarks", "forwarded"} <= set(steps[0])
    assert any(step["plan_hit"] for step in steps)
    number = steps[0]["number"]
    phases = [phase["name"] for phase in debug(address, f"steps/{number}").json()["phases"]]
    assert phases[0] == "lowered" and "prefix-dedup" in phases and "kernel-fusion" in phases
    assert "batch.step @step" in debug(address, f"steps/{number}/ir").text
    assert "batch.cascade" not in debug(address, f"steps/{number}/ir?after=lowered").text
    fused = debug(address, f"steps/{number}/ir?after=kernel-fusion").text
    assert "nn.add_rms_norm" in fused and "batch.step" not in fused
    blocks = [debug(address, f"requests/{one.id}/cache").json()["blocks"] for one in (first, second)]
    assert blocks[0][0] == {"block": 0, "found": False, "why": "never seen"}
    assert blocks[1][0]["found"] and "on the device" in blocks[1][0]["why"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("steps/999999", 404),
        ("steps/x", 400),
        ("steps?last=0", 400),
        ("steps/0/ir?after=nothing", 404),
        ("requests/nobody/cache", 404),
    ],
)
def test_what_is_not_kept_is_told(address, path, status):
    answer = debug(address, path)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_step_of_embeddings_is_explained_too(client, address):
    client.embeddings.create(model="m", input="x")
    (step, *_) = debug(address, "steps").json()["steps"]
    assert step["pooling"] == "mean"
    assert "batch.report" in debug(address, f"steps/{step['number']}/ir").text
    assert "nn.pool" in debug(address, f"steps/{step['number']}/ir?after=model").text


def test_they_are_behind_the_key_and_only_there_when_asked_for(address):
    assert httpx.get(f"{address}/debug/steps", timeout=60).status_code == 401
    from sagellm.server.app import make_app
    from sagellm.server.config import ServerConfig

    paths = make_app(ServerConfig(), lambda: None, print).openapi()["paths"]
    assert "/v1/embeddings" in paths and not any(path.startswith("/debug") for path in paths)
