"""The control plane's routes."""

import asyncio
import json

import pytest
from planes import run, served
from third_party import Echo

from sagellm.cli import capture
from sagellm.control_plane.app import make_app
from sagellm.control_plane.endpoint import AppEndpoint, events
from sagellm.control_plane.manager import ControlPlaneManager
from sagellm.control_plane.plain import plain_app
from sagellm.control_plane.verify import SERVER, Server
from sagellm.engine.base import GenerateRequest
from sagellm.engine.engine import SageLLMEngine

MANAGEMENT = "/v1/management"


@pytest.fixture(scope="module")
def engine():
    with SageLLMEngine("builtin", dtype="float32", max_length=2048) as one:
        yield one


class Plane:
    """Routes of a control plane with one engine, called without a network."""

    def __init__(self, manager, keys=()):
        self.endpoint = AppEndpoint(make_app(manager, keys))

    async def ask(self, method, path, body=None, **headers):
        reply = await self.endpoint.send(method, path, body, headers)
        if not reply.headers["content-type"].startswith("application/json"):
            return reply.status, (await reply.read()).decode()
        return reply.status, await reply.json()


async def plane(engine, keys=(), **settings):
    manager = ControlPlaneManager(probe_every=0.05, **settings)
    await manager.start()
    if engine is not None:
        manager.register_engine("sagellm", engine)
        await manager.wait_until_ready("sagellm")
    return manager, Plane(manager, keys)


def test_it_is_itself_a_server_as_control_planes_want_one(engine):
    async def main():
        manager, here = await plane(engine)
        results = await SERVER.run(Server(here.endpoint, engine.model_id))
        await manager.stop()
        return results

    results = run(main(), 300)
    assert not [result for result in results if result.outcome == "broken"]


def test_a_client_that_goes_away_ends_its_request_at_the_engine(engine):
    async def main():
        manager, here = await plane(engine)
        body = {
            "model": engine.model_id,
            "prompt": "Once",
            "max_tokens": 2000,
            "stream": True,
            "ignore_eos": True,
        }
        reply = await here.endpoint.send("POST", "/v1/completions", body)
        async for _ in events(reply):
            break
        assert engine.stats().running == 1
        await reply.aclose()
        while engine.stats().running or manager.get_engine_info("sagellm").active_requests:
            await asyncio.sleep(0.01)
        assert manager.outcomes == {("sagellm", "refused"): 1}, "nothing is held against the engine"
        await manager.stop()

    run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_request_is_not_at_the_engine_any_more(engine, stream):
    async def main():
        manager, here = await plane(engine)
        body = {"model": engine.model_id, "prompt": "x", "stream": stream, "no_such_field": 1}
        status, said = await here.ask("POST", "/v1/completions", body)
        assert status == 400 and "no_such_field" in said["error"]["message"]
        assert manager.get_engine_info("sagellm").active_requests == 0
        await manager.stop()

    run(main())


def test_an_engine_that_cannot_start_says_why_in_one_line(tmp_path):
    async def main():
        manager, here = await plane(None, logs=tmp_path)
        body = {"model": str(tmp_path / "nothing"), "wait": True, "extra": ["--core", "inline"]}
        found = await here.ask("POST", f"{MANAGEMENT}/engines", body)
        await manager.stop()
        return found, manager.members

    (status, said), members = run(main(), 300)
    assert status == 400 and not members
    assert said["error"]["message"].startswith("sagellm-1 ended with status 2: sagellm serve: error: ")


def test_engines_are_managed_over_http(engine):
    async def main():
        manager, here = await plane(engine)
        async with served(make_app(ControlPlaneManager())) as port:  # whatever answers /health
            body = {"engine_id": "two", "model_id": "m", "host": "127.0.0.1", "port": port}
            status, info = await here.ask("POST", f"{MANAGEMENT}/engines/register", body)
            assert (status, info["engine_id"], info["state"]) == (200, "two", "starting")
            status, said = await here.ask("POST", f"{MANAGEMENT}/engines/register", body)
            assert status == 400 and "in use" in said["error"]["message"]
        _, listed = await here.ask("GET", f"{MANAGEMENT}/engines")
        assert [one["engine_id"] for one in listed["engines"]] == ["sagellm", "two"]
        status, info = await here.ask("DELETE", f"{MANAGEMENT}/engines/two?drain=false")
        assert (status, info["state"]) == (200, "stopped")
        status, said = await here.ask("DELETE", f"{MANAGEMENT}/engines/two")
        assert status == 404 and "accepted: sagellm" in said["error"]["message"]
        _, info = await here.ask("POST", f"{MANAGEMENT}/engines/sagellm/drain", {})
        assert info["state"] == "draining"
        status, said = await here.ask("POST", "/v1/completions", {"prompt": "x", "model": engine.model_id})
        assert status == 503 and said["error"]["code"] == "not_accepting"
        await manager.stop()

    run(main())


def test_a_decision_is_explained(engine):
    async def main():
        manager, here = await plane(engine)
        chat = {"model": engine.model_id, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        status, _ = await here.ask("POST", "/v1/chat/completions", chat, **{"x-slo-deadline-ms": "5000"})
        assert status == 200
        _, found = await here.ask("GET", f"{MANAGEMENT}/decisions?limit=1")
        (decision,) = found["decisions"]
        assert decision["chosen"] == "sagellm" and decision["strategy"] == "composite"
        assert decision["candidates"]["sagellm"]
        status, said = await here.ask("GET", f"{MANAGEMENT}/requests/{decision['request_id']}")
        assert said["state"] == "finished" and said["slo_deadline_ms"] == 5000
        while (state := (await here.ask("GET", f"{MANAGEMENT}/status"))[1])["engines"][0]["load"]["running"]:
            await asyncio.sleep(0.02)  # the last probe may have met the request
        assert state["states"] == {"ready": 1}
        _, text = await here.ask("GET", "/metrics")
        assert 'requests_total{engine="sagellm",outcome="answered"} 1.0' in text
        _, models = await here.ask("GET", "/v1/models")
        assert models["data"][0] | {"created": 0} == {
            "id": engine.model_id, "object": "model", "created": 0, "owned_by": "sagellm",
            "engines": ["sagellm"], "max_model_len": 2048,
        }  # fmt: skip
        await manager.stop()

    run(main())


@pytest.mark.parametrize(
    "path, body, headers, status, said",
    [
        ("/v1/chat/completions", {"model": "no-such", "messages": []}, {}, 404, "unknown model 'no-such'"),
        ("/v1/completions", [1], {}, 400, "no JSON object"),
        ("/v1/completions", b"{", {}, 400, "valid JSON"),
        ("/v1/completions", {"prompt": "x", "stream": "yes"}, {}, 400, "stream is 'yes'"),
        (
            "/v1/completions",
            {"prompt": "x"},
            {"x-slo-deadline-ms": "soon"},
            400,
            "x-slo-deadline-ms is 'soon'",
        ),
        (
            "/v1/completions",
            {"model": "no-such", "prompt": "x", "max_tokens": 10**400},
            {},
            404,
            "unknown model",
        ),
        ("/v1/completions", {"prompt": "x"}, {"x-priority": "urgent"}, 400, "unknown priority 'urgent'"),
        (f"{MANAGEMENT}/engines", {"model": "m", "engine_kind": "tgi"}, {}, 400, "unknown engine kind 'tgi'"),
        (
            f"{MANAGEMENT}/engines/register",
            {
                "engine_id": "x",
                "model_id": "m",
                "host": "h",
                "port": 1,
                "metadata": {"max_concurrent": "many"},
            },
            {},
            400,
            "metadata.max_concurrent is 'many'",
        ),
        (f"{MANAGEMENT}/engines", {"model": "m", "speed": 1}, {}, 400, "unknown parameter 'speed'"),
        (f"{MANAGEMENT}/engines", {"model": "m"}, {"origin": "http://evil.example"}, 403, "need a key"),
    ],
)
def test_bad_requests_get_one_line(engine, path, body, headers, status, said):
    async def main():
        manager, here = await plane(engine)
        found = await here.ask("POST", path, body, **headers)
        await manager.stop()
        return found

    got, answer = run(main())
    assert got == status and said in answer["error"]["message"] and "\n" not in answer["error"]["message"]


def test_a_key_opens_all_but_health(engine):
    async def main():
        manager, here = await plane(None, ("secret",))
        assert (await here.ask("GET", "/health"))[0] == 200
        assert (await here.ask("GET", f"{MANAGEMENT}/engines"))[0] == 401
        headers = {"authorization": "Bearer secret", "origin": "http://a.page"}
        assert (await here.ask("GET", f"{MANAGEMENT}/engines", **headers))[0] == 200
        await manager.stop()

    run(main())


def test_a_registry_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "engines.keys").write_text("{}")
    (tmp_path / "engines.keys").chmod(0o640)
    found = capture(["gateway", "--port", "0", "--registry", str(tmp_path / "engines.json")])
    assert found.code == 2 and found.stderr.count("\n") == 1
    assert "engines.keys' has the mode 640; accepted: 600" in found.stderr


def test_an_open_address_needs_a_key():
    found = capture(["gateway", "--host", "0.0.0.0", "--port", "0", "--registry", "/nowhere/x.json"])
    assert found.code == 2 and "accepted: --api-key, or a loopback address" in found.stderr


class Mute(Echo):
    """It does not tell what it makes of a conversation."""

    def chat_prompt(self, messages):
        return None

    async def chat(self, messages, sampling=None):
        return await self.generate(GenerateRequest(prompt=messages[-1]["content"], sampling=sampling))


@pytest.mark.parametrize(("kind", "pieces"), [(Echo, 6), (Mute, 1)])
def test_a_chat_of_any_engine_object_is_streamed_where_it_tells_the_prompt(kind, pieces):
    async def main():
        manager, here = await plane(None)
        manager.register_engine("third", kind())
        await manager.wait_until_ready("third")
        body = {
            "messages": [{"role": "user", "content": "abc"}],
            "max_tokens": 6,
            "temperature": 0,
            "stream": True,
        }
        body["stream_options"] = {"include_usage": True}
        reply = await here.endpoint.send("POST", "/v1/chat/completions", body)
        chunks = [json.loads(data) async for data in events(reply)]
        *said, usage = chunks
        deltas = [chunk["choices"][0]["delta"] for chunk in said]
        assert "".join(delta["content"] for delta in deltas) == "abcabc" and len(deltas) == pieces
        assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (pieces - 1)
        assert said[-1]["choices"][0]["finish_reason"] == "length"
        assert (usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"]) == (3, 6)
        for path, more in {"chat/completions": {"messages": [{"role": "user", "content": "x" * 300}]},
                           "completions": {"prompt": "x" * 300}}.items():  # fmt: skip
            status, said = await here.ask("POST", f"/v1/{path}", {"stream": True} | more)
            assert status == 400 and "the prompt has 300 tokens" in said["error"]["message"]
        await manager.stop()

    run(main())


def test_any_engine_object_has_a_plain_face(engine):
    """What the interface can say is served; what it cannot is refused by name."""

    async def main():
        here = Plane(ControlPlaneManager())
        here.endpoint = AppEndpoint(plain_app(engine))
        results = await SERVER.run(Server(here.endpoint, engine.model_id))
        status, said = await here.ask("POST", "/v1/completions", {"prompt": "x", "tools": [1]})
        assert status == 400 and said["error"]["message"].startswith("tools is not supported")
        status, said = await here.ask("POST", "/v1/embeddings", {"input": ["a", "b"]})
        assert status == 200 and len(said["data"]) == 2
        return {result.promise: result.outcome for result in results}

    outcomes = run(main(), 300)
    broken = [promise for promise, outcome in outcomes.items() if outcome == "broken"]
    assert broken == [], outcomes
