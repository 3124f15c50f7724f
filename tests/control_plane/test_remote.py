"""An engine at an address, as an object: what is sent, what comes back, and what is said where it cannot be had."""

import asyncio
import json

import numpy as np
import pytest
from planes import run
from third_party import SCHEMA, Echo

from sagellm.batch import SamplingParams
from sagellm.control_plane import remote
from sagellm.control_plane.endpoint import Endpoint, EngineLost, Reply
from sagellm.control_plane.remote import RemoteEngine, read_load
from sagellm.engine.base import EngineState, GenerateRequest
from sagellm.errors import QueueFull, UserError
from sagellm.schemas import QuantizationProfile

pytestmark = pytest.mark.contract

GOOD = {
    "/health": (200, {}),
    "/v1/models": (200, {"data": [{"id": "m", "max_model_len": 99}]}),
    "/info": (404, {}),
    "/v1/completions": (200, {"choices": [{"index": 0, "text": "hi", "finish_reason": "stop"}]}),
    "/v1/chat/completions": (
        200,
        {"choices": [{"index": 0, "message": {"content": None}, "finish_reason": "stop"}]},
    ),
    "/v1/embeddings": (200, {"data": [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [1.0]}]}),
    "/metrics": (200, ""),
}


class Scripted(Endpoint):
    """Answers each route as it is told; None is silent until the request is ended."""

    def __init__(self, **routes):
        self.routes = GOOD | {f"/{name.replace('__', '/')}": answer for name, answer in routes.items()}
        self.asked = []

    async def send(self, method, path, body=None, headers=None, timeout=None):
        self.asked.append((path, body))
        answer = self.routes[path]
        if answer is None:
            await asyncio.sleep(60)
        status, said = answer
        text = said.encode() if isinstance(said, str) else json.dumps(said).encode()

        async def pieces():
            yield text

        async def close():
            return None

        return Reply(status, {}, pieces(), close)

    async def aclose(self):
        return None


def started(use, model_id=None, **routes):
    async def main():
        engine = RemoteEngine(Scripted(**routes), model_id)
        await engine.start()
        return await use(engine)

    return run(main())


def test_nothing_is_known_before_the_start():
    engine = RemoteEngine(Scripted())
    assert engine.state is EngineState.STARTING
    with pytest.raises(UserError, match=r"^remote was not started; accepted: start\(\) first$"):
        engine.get_capability()


@pytest.mark.parametrize(
    ("routes", "model", "said"),
    [
        ({"v1__models": (200, {"data": []})}, None, "^remote serves no model$"),
        ({}, "other", "^remote does not serve 'other'; it has: m$"),
        ({"v1__models": (401, {"error": "no key"})}, None, "^401: no key$"),
        ({"health": (503, {"detail": "loading"})}, None, r"^remote is not ready after 0 s: 503: .*loading"),
    ],
)
def test_a_server_that_cannot_be_used_is_one_line(routes, model, said, monkeypatch):
    monkeypatch.setattr(remote, "START_SECONDS", 0.0)

    async def use(engine):
        raise AssertionError("it started")

    with pytest.raises(UserError, match=said):
        started(use, model, **routes)


def test_health_tells_starting_from_draining_and_from_lost():
    async def main():
        server = Scripted(health=(503, "loading"))
        engine = RemoteEngine(server)
        states = [(await engine.health()).state]
        for answer in ((200, {}), (503, {}), (500, {})):
            server.routes["/health"] = answer
            states.append((await engine.health()).state)
        return states

    assert run(main()) == [EngineState.STARTING, EngineState.READY, EngineState.DRAINING, EngineState.ERROR]


def test_a_server_of_ours_tells_what_it_can_do():
    info = {"capability": Echo().get_capability().to_dict(), "kv_schema": SCHEMA.to_dict()}

    async def use(engine):
        return engine.get_capability(), engine.get_kv_schema()

    assert started(use, info=(200, info)) == (Echo().get_capability(), SCHEMA)

    async def plain(engine):
        assert engine.get_capability().max_sequence_length == 99
        with pytest.raises(UserError, match="does not tell how its KV cache is stored"):
            engine.get_kv_schema()

    started(plain)


def test_only_what_is_asked_for_is_sent():
    """So that servers need not know all of it."""
    how = SamplingParams(
        max_tokens=5,
        stop="x",
        stop_token_ids=[3],
        logit_bias={7: 1.5},
        logprobs=2,
        grammar={"choice": ["a", "b"]},
    )
    work = GenerateRequest(prompt=[1, 2], sampling=how, priority=2, salt="s", resume=[9])

    async def use(engine):
        assert (await engine.generate(GenerateRequest(prompt="hello"))).text == "hi"
        await engine.generate(work)
        assert (await engine.chat([{"role": "user", "content": "a"}], how)).text == ""
        vectors = await engine.embed(["a", [4]], pooling="cls", normalize=False)
        assert np.array_equal(vectors, [[1.0], [2.0]])
        return [
            body for path, body in engine.endpoint.asked if path not in ("/health", "/v1/models", "/info")
        ]

    plain, full, chat, embed = started(use)
    assert plain == {"model": "m", "prompt": "hello", "max_tokens": 128, "temperature": 0.0}
    assert full == {
        "model": "m", "prompt": [1, 2], "max_tokens": 5, "temperature": 0.0, "stop": ["x"], "stop_token_ids": [3],
        "logit_bias": {"7": 1.5}, "logprobs": 2, "structured_outputs": {"choice": ["a", "b"]}, "priority": 2,
        "cache_salt": "s", "resume_token_ids": [9],
    }  # fmt: skip
    assert (chat["logprobs"], chat["top_logprobs"]) == (True, 2)
    assert embed == {"model": "m", "input": ["a", [4]], "pooling": "cls", "normalize": False}


def test_what_has_no_words_in_the_api_is_refused():
    request = GenerateRequest(prompt="a")

    async def use(engine):
        engine.load_quant_profile(QuantizationProfile())
        int8 = QuantizationProfile(method="int8", weight_bits=8)
        refused = [
            (lambda: engine.load_quant_profile(int8), "for a server that runs"),
            (lambda: engine.generate(["a"]), "one GenerateRequest at a time"),
            (lambda: engine.decode(request, None), "takes no KV blocks"),
        ]
        for ask, said in refused:
            with pytest.raises(UserError, match=said):
                ask()
        for work, said in (
            (engine.prefill(request), "does not give its KV blocks away"),
            (engine.generate(GenerateRequest(prompt="a", pooling="mean")), r"accepted: embed\(\)"),
        ):
            with pytest.raises(UserError, match=said):
                await work

    started(use)


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        (400, {"error": {"message": "bad\nfield"}}, UserError, "^400: bad field$"),
        (429, {"error": {"message": "full"}}, QueueFull, "^429: full$"),
        (422, {"message": "wrong"}, UserError, "^422: wrong$"),
        (502, "<html>bad gateway</html>", EngineLost, "^502: <html>bad gateway</html>$"),
    ],
)
def test_a_refusal_is_the_callers_and_a_failure_the_engines(status, body, kind, said):
    async def use(engine):
        await engine.generate(GenerateRequest(prompt="a"))

    with pytest.raises(kind, match=said):
        started(use, v1__completions=(status, body))


def test_a_request_that_waits_for_its_answer_can_be_ended():
    async def use(engine):
        request = GenerateRequest(prompt="a", id="mine", sampling=SamplingParams(n=2))
        task = asyncio.create_task(engine.generate(request))
        await asyncio.sleep(0)
        while "mine" not in engine._calls:
            await asyncio.sleep(0)
        with pytest.raises(UserError, match="'mine' is in use"):
            await engine.generate(GenerateRequest(prompt="b", id="mine"))
        await asyncio.sleep(0.01)
        assert await engine.abort("mine")
        return [output.finish_reason for output in (await task).outputs]

    assert started(use, v1__completions=None) == ["abort", "abort"]


def test_stopping_ends_what_is_open_and_takes_nothing_more():
    async def use(engine):
        task = asyncio.create_task(engine.generate(GenerateRequest(prompt="a")))
        await asyncio.sleep(0.01)
        await engine.stop(0.01)
        assert (await task).finish_reason == "abort"
        assert engine.state is EngineState.STOPPED and not (await engine.health()).ready
        with pytest.raises(UserError, match=r"^remote was stopped; accepted: requests before that$"):
            await engine.generate(GenerateRequest(prompt="a"))

    started(use, v1__completions=None)


@pytest.mark.contract
def test_several_series_are_added_up_but_for_the_use_of_caches():
    text = 'run{rank="0"} 2.0\nrun{rank="1"} 3.0\nuse{rank="0"} 0.5\nuse{rank="1"} 0.9\n'
    load = read_load(text, {"running": ("run",), "kv_use": ("use",)})
    assert (load.running, load.kv_use) == (5, pytest.approx(0.7))
