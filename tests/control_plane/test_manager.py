"""A control plane over engines in this process and at addresses."""

import asyncio
import os
import socket

import pytest
import uvicorn
from planes import run, served
from third_party import Echo

from sagellm.batch import SamplingParams
from sagellm.control_plane import watch
from sagellm.control_plane.app import make_app
from sagellm.control_plane.client import AsyncInferenceClient, UnifiedInferenceClient
from sagellm.control_plane.endpoint import AppEndpoint, EngineLost, HttpEndpoint
from sagellm.control_plane.manager import ControlPlaneManager
from sagellm.control_plane.plain import plain_app
from sagellm.control_plane.remote import RemoteEngine
from sagellm.control_plane.types import RequestMetadata
from sagellm.engine.base import EngineState, GenerateRequest
from sagellm.engine.engine import SageLLMEngine
from sagellm.errors import UserError
from sagellm.server.app import app_of
from sagellm.server.config import ServerConfig

MESSAGES = [{"role": "user", "content": "你好"}]


@pytest.fixture(scope="module")
def engine():
    with SageLLMEngine("builtin", dtype="float32", max_length=2048) as one:
        yield one


async def plane(**settings):
    manager = ControlPlaneManager(probe_every=0.05, **settings)
    await manager.start()
    return manager


def test_an_engine_object_answers_through_the_manager(engine):
    async def main():
        manager = await plane()
        info = manager.register_engine("sagellm", engine)
        await manager.wait_until_ready("sagellm")
        assert (info.state, info.model_id) == (EngineState.READY, engine.model_id)
        request = RequestMetadata(prompt=MESSAGES, request_type="llm_chat", max_tokens=8, temperature=0)
        answer = await manager.submit_request(request)
        alone = await engine.chat(MESSAGES, SamplingParams(max_tokens=8))
        assert answer["choices"][0]["message"]["content"] == alone.text
        status = manager.get_request_status(request.request_id)
        made = answer["usage"]["completion_tokens"]
        assert (status["state"], status["tokens_generated"]) == ("finished", made)
        assert manager.get_engine_info("sagellm").active_requests == 0
        await manager.stop()

    run(main())


def test_an_engine_that_is_registered_before_it_listens_becomes_ready(engine):
    async def main():
        manager = await plane()
        found = socket.socket()
        found.bind(("127.0.0.1", 0))  # which nobody else gets meanwhile
        port = found.getsockname()[1]
        manager.register_engine("later", engine.model_id, "127.0.0.1", port, "sagellm")
        await asyncio.sleep(0.2)
        assert manager.get_engine_state("later") is not EngineState.READY
        server = uvicorn.Server(uvicorn.Config(app_of(engine), log_level="error", lifespan="off"))
        task = asyncio.create_task(server.serve([found]))
        info = await manager.wait_until_ready("later")
        assert info.is_healthy and info.last_heartbeat is not None
        server.should_exit = True
        await task
        while manager.get_engine_state("later") is EngineState.READY:
            await asyncio.sleep(0.02)
        assert manager.get_engine_state("later") is EngineState.ERROR
        assert manager.prune() == ["later"]
        await manager.stop()

    run(main())


@pytest.mark.parametrize("first", ["the plane", "the engine"])
def test_an_object_that_nobody_has_started_is_started_and_stopped(first):
    async def main():
        manager, echo = ControlPlaneManager(probe_every=0.05), Echo()
        if first == "the plane":
            await manager.start()
        manager.register_engine("echo", echo)
        await manager.start()
        await manager.wait_until_ready("echo")
        answer = await manager.submit_request(RequestMetadata(prompt="ab", max_tokens=3, temperature=0))
        assert answer["choices"][0]["text"] == "aba"
        await manager.stop()
        return echo.state

    assert run(main()) is EngineState.STOPPED


class Patient(Echo):
    """It is started once, however often `start` is called."""

    def __init__(self):
        super().__init__()
        self.starts, self.go_on = 0, asyncio.Event()

    async def start(self):
        self.starts += 1
        if self.starts == 1:
            await self.go_on.wait()
            await super().start()


def test_an_object_that_somebody_else_started_goes_on():
    """Also where it was about to be ready when it was registered."""

    async def main():
        manager = await plane()
        running, about_to = Echo(), Patient()
        await running.start()
        theirs = asyncio.create_task(about_to.start())
        await asyncio.sleep(0)
        async with served(plain_app(running)) as port:
            remote = RemoteEngine(f"http://127.0.0.1:{port}")
            await remote.start()
            for name, one in {"running": running, "about-to": about_to, "remote": remote}.items():
                manager.register_engine(name, one)
            await manager.wait_until_ready("running")
            await manager.wait_until_ready("remote")
            while about_to.starts < 2:
                await asyncio.sleep(0.01)
            about_to.go_on.set()
            await theirs
            await manager.wait_until_ready("about-to")
            assert about_to.starts == 2
            await manager.stop_engine_gracefully("running")
            await manager.stop()
            assert [(await one.health()).ready for one in (running, about_to, remote)] == [True] * 3
            await remote.stop()

    run(main())


def test_an_object_that_is_told_to_stop_while_it_starts_ends():
    async def main():
        manager, echo = await plane(), Patient()
        manager.register_engine("echo", echo)
        while not echo.starts:
            await asyncio.sleep(0.01)
        await manager.stop()
        return echo.state

    assert run(main()) is EngineState.STOPPED


def test_an_object_that_does_not_stop_or_say_how_it_is_holds_up_nobody(monkeypatch):
    class Stubborn(Echo):
        async def stop(self, drain_s=30):
            raise OSError("the device is gone")

    class Mute(Echo):
        async def health(self):
            await asyncio.sleep(60)

    async def main():
        manager, stubborn, mute, echo = await plane(), Stubborn(), Mute(), Echo()
        for name, one in {"stubborn": stubborn, "mute": mute, "echo": echo}.items():
            manager.register_engine(name, one)
        for name in ("stubborn", "echo"):
            await manager.wait_until_ready(name)
        while manager.get_engine_state("mute") is not EngineState.ERROR:
            await asyncio.sleep(0.01)
        await manager.stop()
        assert not manager.members and echo.state is mute.state is EngineState.STOPPED

    monkeypatch.setattr(watch, "HEALTH_SECONDS", 0.05)
    run(main())


def test_an_object_that_does_not_start_says_why_in_one_line():
    class Broken(Echo):
        async def start(self):
            raise OSError("no such device")

    async def main():
        manager = await plane()
        manager.register_engine("echo", Broken())
        while manager.get_engine_state("echo") is not EngineState.ERROR:
            await asyncio.sleep(0.01)
        assert manager.get_cluster_status()["engines"][0]["detail"] == "OSError: no such device"
        with pytest.raises(UserError, match=r"^OSError: no such device$"):
            await manager.wait_until_ready("echo")
        await manager.stop()

    run(main())


def test_a_remote_engine_is_an_engine(engine):
    async def main():
        async with served(app_of(engine)) as port:
            from sagellm.control_plane.adapters import adapter

            remote = adapter("sagellm")(f"http://127.0.0.1:{port}")
            await remote.start()
            assert remote.get_capability() == engine.get_capability()
            assert remote.get_kv_schema() == engine.get_kv_schema()
            how = SamplingParams(max_tokens=12)
            here, there = (
                engine.generate(["Once upon"], how)[0],
                await remote.generate(GenerateRequest(prompt="Once upon", sampling=how)),
            )
            assert (there.text, there.prompt_tokens) == (here.text, here.prompt_tokens)
            text = "".join([e.text async for e in remote.stream("Once upon", how)])
            assert text == here.text
            vectors = await remote.embed(["one", "two"])
            assert (
                vectors.shape == (2, 256) and abs(vectors - await engine.embed(["one", "two"])).max() < 1e-5
            )
            load = await remote.refresh()
            assert load.running == 0 and load.generated > 0 and load.kv_use is not None
            with pytest.raises(UserError, match="2048"):
                await remote.generate(GenerateRequest(prompt=[1] * 2100, sampling=how))
            await remote.stop()

    run(main())


def test_an_abort_reaches_the_server(engine):
    async def main():
        async with served(app_of(engine)) as port:
            remote = RemoteEngine(f"http://127.0.0.1:{port}")
            await remote.start()
            how = SamplingParams(max_tokens=2000, ignore_eos=True)
            events = []
            async for event in remote.stream(GenerateRequest(prompt="Once", sampling=how, id="mine")):
                events.append(event)
                if len(events) == 3:
                    assert await remote.abort("mine")
            assert events[-1].finish_reason == "abort"
            while engine.stats().running:
                await asyncio.sleep(0.02)
            assert not await remote.abort("mine")
            await remote.stop()

    run(main())


def test_one_client_speaks_to_a_manager_a_server_and_an_engine(engine):
    async def main():
        texts = []
        manager = ControlPlaneManager()
        manager.register_engine("sagellm", engine)
        async with served(app_of(engine)) as port:
            for where in (
                {"manager": manager},
                {"engine": engine},
                {"control_plane_url": f"http://127.0.0.1:{port}/v1"},
            ):
                async with await AsyncInferenceClient.create(**where) as client:
                    whole = await client.chat(MESSAGES, max_tokens=8, temperature=0)
                    pieces = [c async for c in client.chat_stream(MESSAGES, max_tokens=8, temperature=0)]
                    said = "".join(c["choices"][0]["delta"].get("content") or "" for c in pieces)
                    assert said == whole["choices"][0]["message"]["content"]
                    texts.append(said)
                    assert (await client.models())[0]["id"] == engine.model_id
                    with pytest.raises(UserError, match="no-such"):
                        await client.chat(MESSAGES, model="no-such")
        assert len(set(texts)) == 1

    run(main())


def test_a_program_without_an_event_loop_gets_the_same(engine):
    manager = ControlPlaneManager()
    manager.register_engine("sagellm", engine)
    with UnifiedInferenceClient.create(manager=manager) as client:
        answer = client.chat(MESSAGES, max_tokens=8, temperature=0)
        pieces = client.generate_stream("Once upon", max_tokens=8, temperature=0)
        text = "".join(choice["text"] for chunk in pieces for choice in chunk["choices"])
        assert text == client.generate("Once upon", max_tokens=8, temperature=0)["choices"][0]["text"]
        assert len(client.embed(["a", "b"])["data"]) == 2
        assert 0 < answer["usage"]["completion_tokens"] <= 8


def test_a_cancelled_request_ends_at_its_engine(engine):
    async def main():
        manager = await plane()
        manager.register_engine("sagellm", engine)
        await manager.wait_until_ready("sagellm")
        request = RequestMetadata(prompt="Once", max_tokens=2000, temperature=0)
        task = asyncio.create_task(manager.submit_request(request))
        while not engine.stats().running:
            await asyncio.sleep(0.01)
        assert await manager.cancel_request(request.request_id)
        with pytest.raises(UserError, match="cancelled"):
            await task
        while engine.stats().running:
            await asyncio.sleep(0.01)
        assert not await manager.cancel_request(request.request_id)
        assert manager.get_engine_info("sagellm").active_requests == 0
        await manager.stop()

    run(main())


def test_a_draining_engine_gets_nothing_new_and_ends_when_it_is_idle(engine):
    async def main():
        manager = await plane()
        manager.register_engine("sagellm", engine)
        await manager.wait_until_ready("sagellm")
        await manager.start_engine_drain("sagellm")
        await asyncio.sleep(0.2)
        assert manager.get_engine_state("sagellm") is EngineState.DRAINING
        with pytest.raises(UserError, match="takes requests now"):
            await manager.submit_request(RequestMetadata(prompt="Once"))
        info = await manager.stop_engine_gracefully("sagellm")
        assert info.is_terminal and not manager.members
        assert (await engine.health()).ready, "it was not started here"
        await manager.stop()

    run(main())


def test_full_engines_keep_requests_waiting_and_then_refuse(engine):
    async def main():
        manager = await plane(queue=2)
        manager.register_engine("sagellm", engine, metadata={"max_concurrent": 1})
        await manager.wait_until_ready("sagellm")
        asks = [RequestMetadata(prompt="Once", max_tokens=30) for _ in range(4)]
        tasks = [asyncio.create_task(manager.submit_request(one)) for one in asks]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [one for one in results if isinstance(one, UserError)]
        assert len(refused) == 1 and "wait" in str(refused[0])
        assert sum(isinstance(one, dict) for one in results) == 3
        await manager.stop()

    run(main())


def test_a_registry_brings_engines_back(engine, tmp_path):
    async def main():
        async with served(app_of(engine)) as port:
            first = await plane(registry=tmp_path / "engines.json")
            first.register_engine(
                "one", engine.model_id, "127.0.0.1", port, "sagellm", {"labels": {"zone": "a"}}
            )
            first.register_engine("object", engine)
            await first.stop()
            second = await plane(registry=tmp_path / "engines.json")
            assert [info.engine_id for info in second.list_registered_engines()] == ["one"]
            info = await second.wait_until_ready("one")
            assert info.metadata["labels"] == {"zone": "a"}
            await second.stop()

    run(main())


def test_the_key_of_an_engine_is_kept_and_never_shown(engine, tmp_path, caplog):
    """Whoever asks the control plane, whatever it keeps of requests and engines, and whatever it logs."""
    caplog.set_level("DEBUG")
    registry = tmp_path / "engines.json"

    async def shown(manager):
        here = AppEndpoint(make_app(manager))
        paths = ["/v1/models", "/metrics", "/info", "/ready"]
        paths += [
            f"/v1/management/{name}" for name in ("engines", "engines/one", "status", "decisions", "backends")
        ]
        return "".join([(await (await here.send("GET", path)).read()).decode() for path in paths])

    async def main():
        app = app_of(engine, ServerConfig(api_keys=("hidden-word",)))
        async with served(app) as port:
            first = await plane(registry=registry)
            body = {"engine_id": "one", "model_id": engine.model_id, "host": "127.0.0.1", "port": port}
            register = "/v1/management/engines/register"
            reply = await AppEndpoint(make_app(first)).send(
                "POST", register, body | {"api_key": "hidden-word"}
            )
            said = (await reply.read()).decode()
            await first.wait_until_ready("one")
            await first.stop()
            second = await plane(registry=registry)
            await second.wait_until_ready("one")
            answer = await second.submit_request(RequestMetadata(prompt="Once", max_tokens=2))
            assert answer["usage"]["completion_tokens"] == 2
            said += await shown(second) + repr(second.members) + registry.read_text()
            second.unregister_engine("one")
            await second.stop()
        assert "hidden-word" not in said + caplog.text
        assert [path.name for path in tmp_path.iterdir()] == ["engines.json"]

    run(main())


def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated():
    for key in ("", "two words", "schlüssel", "line\n"):
        with pytest.raises(UserError, match="api_key is empty, or has") as refused:
            ControlPlaneManager().register_engine("one", "m", "127.0.0.1", 1, api_key=key)
        assert not key or key not in str(refused.value)


def test_an_engine_that_is_registered_before_the_start_does_not_push_out_those_that_are_kept(tmp_path):
    async def main():
        registry = tmp_path / "engines.json"
        first = await plane(registry=registry)
        first.register_engine("one", "m", "127.0.0.1", 9)
        await first.stop()
        second = ControlPlaneManager(registry=registry)
        second.register_engine("two", "m", "127.0.0.1", 9)
        await second.start()
        assert set(second.members) == {"one", "two"}
        await second.stop()
        third = await plane(registry=registry)
        assert set(third.members) == {"one", "two"}
        await third.stop()

    run(main())


@pytest.mark.parametrize(
    "given, said",
    [
        (("one", "m", "127.0.0.1", 70000), "port is 70000"),
        (("one", "m"), "host and port are missing"),
        (("one", "m", "127.0.0.1", 1, "tgi"), "unknown engine kind 'tgi'"),
        (("one", object()), "is no engine"),
        (("one", "m", "127.0.0.1", 1, "llm", {"api_key": "x"}), "metadata.api_key is given"),
    ],
)
def test_what_is_no_engine_is_refused_in_one_line(given, said):
    with pytest.raises(UserError, match=said):
        ControlPlaneManager().register_engine(*given)


def test_nobody_at_the_address():
    async def main():
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{found.getsockname()[1]}"
            endpoint = HttpEndpoint(f"http://{address}")
            with pytest.raises(EngineLost, match=address):
                await endpoint.send("GET", "/health")
            await endpoint.aclose()

    run(main())


def test_a_control_plane_that_was_killed_finds_its_engines_again_and_can_stop_them(tmp_path):
    async def main():
        settings = {"registry": tmp_path / "engines.json", "logs": tmp_path}
        first = await plane(**settings)
        extra = ("--core", "inline", "--max-length", "64")
        info = await first.request_engine_startup("builtin", extra=extra)
        await first.wait_until_ready(info.engine_id, 300)
        for member in first.members.values():  # as after kill -9: nothing is stopped, nothing said
            member.probing.cancel()
        second = await plane(**settings)
        await second.wait_until_ready(info.engine_id)
        await second.request_engine_shutdown(info.engine_id, 5)
        with pytest.raises(ProcessLookupError):
            os.kill(info.metadata["pid"], 0)
        third = await plane(**settings)
        assert not third.members

    run(main(), 400)
