"""Engines of other kinds: how they are started, and that what their servers do differently reaches nobody."""

import asyncio
import json
import stat
import sys
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import servers
from recording import Replay, drive, reply_of

from sagellm.batch import SamplingParams
from sagellm.control_plane.adapters import ADAPTERS, adapter
from sagellm.control_plane.adapters.base import EngineOptions
from sagellm.control_plane.adapters.vllm import VLLMBackendAdapter
from sagellm.control_plane.client import AsyncInferenceClient
from sagellm.control_plane.endpoint import EngineLost
from sagellm.control_plane.launch import LocalLauncher
from sagellm.control_plane.manager import ControlPlaneManager
from sagellm.engine.base import EngineState, GenerateRequest
from sagellm.errors import UserError

pytestmark = pytest.mark.contract

KINDS = {"lmdeploy": servers.lmdeploy, "chitu": servers.chitu}


@asynccontextmanager
async def attached(kind: str, engine: servers.Engine):
    """The adapter of a server of this kind that runs."""
    with servers.running(KINDS[kind](engine)) as address:
        here = adapter(kind)(address, engine_id="there")
        await here.start()
        try:
            yield here
        finally:
            await here.stop(0)


def run(kind: str, use, **settings):
    engine = servers.Engine("some-model", **settings)

    async def inside():
        async with attached(kind, engine) as here:
            return await use(here, engine)

    return asyncio.run(inside())


def asked(prompt="abc", **how) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, sampling=SamplingParams(**how))


@pytest.mark.parametrize("kind", KINDS)
def test_requests_are_answered_as_by_any_engine(kind):
    async def use(here, engine):
        whole = await here.generate(asked(max_tokens=5))
        assert (whole.text, whole.finish_reason, whole.prompt_tokens) == ("abcab", "length", 3)
        assert (await here.generate(asked("ab.cd"))).finish_reason == "stop"
        pieces = [event async for event in here.stream(asked(max_tokens=5))]
        assert "".join(event.text for event in pieces) == "abcab"
        assert [event.finish_reason for event in pieces if event.finish_reason] == ["length"]
        chat = await here.chat([{"role": "user", "content": "xyz"}], SamplingParams(max_tokens=4))
        assert (chat.text, chat.finish_reason) == ("xyzx", "length")
        assert (await here.chat([{"role": "user", "content": "hi."}])).finish_reason == "stop"
        assert here.model_id == "some-model" and here.get_capability().backend == kind

    run(kind, use)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_greedy_and_sampled_is_from_all_tokens(kind):
    """Their own defaults are a temperature of 0.8, and 50 tokens."""

    async def use(here, engine):
        await here.generate(asked())
        reply = await here.endpoint.send("POST", "/v1/completions", {"model": here.model_id, "prompt": "abc"})
        assert reply.status == 200 and (await reply.json())["usage"]["completion_tokens"] == 16
        greedy, plain = (body for _, body in engine.asked)
        assert greedy["temperature"] == 0 and (kind != "lmdeploy" or greedy["top_k"] == 1)
        everything = {"lmdeploy": 0, "chitu": -1}[kind]
        assert (plain["temperature"], plain["top_p"], plain["top_k"]) == (1, 1, everything)

    run(kind, use)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_server_would_ignore_is_refused(kind):
    async def use(here, engine):
        for how in (
            {"stop": "x"},
            {"presence_penalty": 1},
            {"logit_bias": {3: 1.0}},
            {"grammar": {"regex": "a"}},
        ):
            with pytest.raises(UserError, match=f"^an engine of kind {kind} cannot serve: [a-z_]+$"):
                await here.generate(asked(**how))
        assert not engine.asked

    run(kind, use)


def test_token_ids_are_no_list_of_prompts():
    async def refuses(here, engine):
        with pytest.raises(UserError, match=r"cannot serve: token_ids$"):
            await here.generate(asked([97, 98]))

    async def takes(here, engine):
        assert (await here.generate(asked([97, 98], max_tokens=3))).text == "aba"

    run("lmdeploy", refuses)
    run("chitu", takes)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_model_is_an_error_of_openais_form(kind):
    async def use(here, engine):
        body = {"model": "nobody" if kind == "lmdeploy" else "", "prompt": "a" * 5000}
        reply = await here.endpoint.send("POST", "/v1/completions", body)
        error = (await reply.json())["error"]
        assert reply.status in (400, 404) and ("nobody" in error["message"] or "4096" in error["message"])
        assert error["type"] == "invalid_request_error"

    run(kind, use)


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_fails_midway_is_lost_and_has_not_finished(kind):
    async def use(here, engine):
        seen = []
        with pytest.raises(EngineLost, match="the device was lost"):
            async for event in here.stream(asked(max_tokens=9)):
                seen.append(event)
        assert "".join(event.text for event in seen) == "abc" and not seen[-1].finish_reason

    run(kind, use, fails_after=3)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_openais(kind):
    async def use(here, engine):
        body = {"model": here.model_id, "messages": [{"role": "user", "content": "abc"}], "max_tokens": 2}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        reply = await here.endpoint.send("POST", "/v1/chat/completions", body)
        lines = [line for line in (await reply.read()).decode().split("\n") if line]
        assert lines.pop() == "data: [DONE]"
        *chunks, last = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert {chunk["model"] for chunk in chunks} == {"some-model"}
        assert all("finish_reason" in chunk["choices"][0] for chunk in chunks)
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 2
        assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 0

    run(kind, use)


def test_an_abort_ends_the_stream_and_where_the_server_can_the_work():
    async def use(here, engine):
        ended = []
        async for event in here.stream(
            GenerateRequest(prompt="abc", id="a", sampling=SamplingParams(max_tokens=100_000))
        ):
            ended.append(event.finish_reason)
            await here.abort("a")
        assert ended[-1] == "abort" and not await here.abort("a")
        async with asyncio.timeout(60):
            while here.KIND != "chitu" and not engine.aborted:
                await asyncio.sleep(0.01)
        return engine.aborted, engine.running

    assert run("lmdeploy", use, pace=0.01) == (1, 0)
    assert run("chitu", use, pace=0.01) == (0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_takes_no_requests_is_not_ready(kind):
    async def use(here, engine):
        assert (await here.health()).ready
        engine.status = "sleeping"
        assert (await here.health()).state is EngineState.DRAINING
        engine.status = "healthy"
        assert (await here.health()).ready

    run(kind, use)


def test_load_is_read_where_each_server_tells_it():
    async def use(here, engine):
        await here.generate(asked(max_tokens=5))
        return await here.refresh()

    found = run("lmdeploy", use)
    assert (found.running, found.waiting, found.kv_use) == (0, 0, 0.25)
    assert (found.prompt, found.generated, found.reused) == (3, 5, 7)
    found = run("chitu", use)
    assert (found.running, found.waiting, found.kv_use) == (0, 0, None)


COMMANDS = {
    "vllm": (
        {"model": "/m", "served_model_name": "m", "kv_schema": "fp8", "pipeline_parallel": 2, "device": "cuda:1"},
        "vllm serve /m --host 127.0.0.1 --port 8001 --served-model-name m --kv-cache-dtype fp8 "
        "--pipeline-parallel-size 2 --enable-prompt-tokens-details",
        {"CUDA_VISIBLE_DEVICES": "1"},
    ),
    "lmdeploy": (
        {"model": "/m", "served_model_name": "m", "kv_schema": "int8", "tensor_parallel": 2, "device": "ascend:0,1"},
        "lmdeploy serve api_server /m --server-name 127.0.0.1 --server-port 8001 --model-name m --device ascend "
        "--quant-policy int8 --tp 2 --enable-prefix-caching",
        {"ASCEND_RT_VISIBLE_DEVICES": "0,1"},
    ),
    "chitu": (
        {"model": "/m", "served_model_name": "Qwen3-8B", "tensor_parallel": 2, "pipeline_parallel": 2},
        "torchrun --standalone --nproc_per_node 4 -m chitu serve.host=127.0.0.1 serve.port=8001 models=Qwen3-8B "
        "models.ckpt_dir=/m infer.tp_size=2 infer.pp_size=2 infer.cache_type=paged infer.enable_prefix_caching=True",
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_server_is_started_by_its_own_command(kind, monkeypatch):
    monkeypatch.delenv(f"SAGELLM_PROGRAM_{kind.upper()}", raising=False)
    given, command, variables = COMMANDS[kind]
    options = EngineOptions(**given, extra=("--more",))
    assert adapter(kind).command(options, 8001) == [*command.split(), "--more"]
    assert adapter(kind).environment(options) == variables


BAD = [
    ("vllm", {"backend": "x"}, "backend is 'x' for an engine of kind vllm; accepted: without it"),
    ("vllm", {"kv_schema": "int8"}, "unknown kv_schema for vLLM 'int8'; accepted: auto, bfloat16, .*"),
    ("vllm", {"device": "ascend"}, r"unknown device 'ascend'; accepted: cuda\[:0,1,...\], cpu"),
    ("vllm", {"device": "cpu:1"}, "device is 'cpu:1'; accepted: cpu"),
    (
        "lmdeploy",
        {"pipeline_parallel": 2},
        "pipeline_parallel is 2 for an engine of kind lmdeploy; accepted: .*",
    ),
    ("lmdeploy", {"backend": "x"}, "unknown backend for LMDeploy 'x'; accepted: turbomind, pytorch"),
    ("chitu", {}, "served_model_name is None for Chitu; accepted: a name of its config/models"),
]


@pytest.mark.parametrize(("kind", "given", "says"), BAD)
def test_options_that_an_engine_has_not_are_refused_in_one_line(kind, given, says):
    with pytest.raises(UserError, match=f"^{says}$"):
        adapter(kind).command(EngineOptions(model="/m", **given), 8001)


def launched(kind: str, folder: Path, **given):
    async def make():
        launcher, options = LocalLauncher(), EngineOptions(model="/m", served_model_name="m", **given)
        port = await launcher.free_port()
        return adapter(kind).launched(options, launcher, port, engine_id=kind, log=folder / "log")

    return make()


@pytest.mark.parametrize("kind", KINDS)
def test_a_started_server_serves_and_ends_when_it_is_stopped(kind, tmp_path, monkeypatch):
    program = tmp_path / kind
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {servers.__file__} {kind} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(f"SAGELLM_PROGRAM_{kind.upper()}", str(program))

    async def use():
        here = await launched(kind, tmp_path, max_model_len=512)
        await here.start()
        assert (await here.generate(asked(max_tokens=4))).text == "abca"
        assert here.get_capability().max_sequence_length == 512
        process = here.process
        await here.stop(5)
        assert (await here.health()).state is EngineState.STOPPED
        return process.status()

    assert asyncio.run(use()) is not None


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "sagellm"])
def test_an_engine_that_is_not_installed_says_what_to_do(kind, tmp_path, monkeypatch):
    monkeypatch.setenv(f"SAGELLM_PROGRAM_{kind.upper()}", "/nowhere/there")

    async def use():
        here = await launched(kind, tmp_path)
        await here.start()

    with pytest.raises(UserError, match=f"^'/nowhere/there' was not found; .*SAGELLM_PROGRAM_{kind.upper()}"):
        asyncio.run(use())


def test_vllm_is_understood_as_it_was_recorded():
    """Version 0.32.0, with the built-in model of sageLLM."""
    found = asyncio.run(drive(VLLMBackendAdapter(Replay("vllm"))))
    assert (found["health"].ready, found["model"], found["longest"]) == (True, "builtin", 2048)
    text = found["text"]
    assert (text.text, text.finish_reason, text.prompt_tokens) == (", there was a kind boy", "length", 4)
    events = found["stream"]
    assert "".join(event.text for event in events) == text.text and events[-1].finish_reason == "length"
    assert [token for event in events for token in event.ids] == text.token_ids
    assert [event.index for event in events] == list(range(6))
    assert {event.sample for event in found["two"]} == {0, 1}
    assert found["ids"].prompt_tokens == 3
    assert (found["stop"].text, found["stop"].outputs[0].stopped_by) == (",", " ")
    assert found["regex"].text == "aaa"
    assert found["guided"][1]["choices"][0]["text"] in ("yes", "no")
    assert found["unknown model"][0] == 404 and "nobody" in found["unknown model"][1]["error"]["message"]
    assert found["too long"].startswith("400: max_tokens=1000000 cannot be greater than max_model_len=2048")
    load = found["load"]
    assert (load.running, load.waiting, load.kv_use, load.reused) == (0, 0, 0.0, 0)
    assert load.generated == 45 and load.prompt == 41


def test_a_vllm_model_that_makes_vectors_is_asked_for_nothing_else():
    class Pooling(Replay):
        async def send(self, method, path, body=None, headers=None, timeout=None):
            if path == "/v1/embeddings":
                return reply_of(
                    {"status": 400, "type": "application/json", "answer": {"error": {"message": ""}}}
                )
            return await super().send(method, path, body, headers, timeout)

    async def use():
        here = VLLMBackendAdapter(Pooling("vllm"))
        await here.start()
        with pytest.raises(UserError, match=r"^pooling is 'cls' for vLLM; accepted: the model's own$"):
            await here.embed(["a"], pooling="cls")
        return here.FEATURES

    assert asyncio.run(use()) == {"embeddings", "token_ids"}


def test_a_request_goes_to_the_engine_that_honours_its_fields():
    async def use(ports):
        manager = ControlPlaneManager(probe_every=0.05)
        await manager.start()
        for kind, port in ports.items():
            manager.register_engine(kind, "some-model", "127.0.0.1", port, engine_kind=kind)
            await manager.wait_until_ready(kind)
        async with await AsyncInferenceClient.create(manager=manager) as client:

            async def chosen(**how):
                answer = await client.generate("abc", max_tokens=4, **how)
                assert answer["choices"][0]["text"] == "abca"
                return manager.router.decisions[-1].chosen

            assert {await chosen() for _ in range(4)} <= set(ports)
            assert await chosen(seed=1) == "lmdeploy"
            assert await chosen(frequency_penalty=0.5) == "chitu"
            with pytest.raises(UserError, match="stop"):
                await chosen(stop="x")
        await manager.stop(0)

    with ExitStack() as stack:
        addresses = {
            kind: stack.enter_context(servers.running(make(servers.Engine("some-model"))))
            for kind, make in KINDS.items()
        }
        asyncio.run(use({kind: int(address.rpartition(":")[2]) for kind, address in addresses.items()}))
