"""Is it an engine? What the interface promises, asked of one that runs: ours, another project's, or a server's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
from attrs import define, frozen
from pydantic_core import from_json

from sagellm.batch import SamplingParams
from sagellm.control_plane.endpoint import Endpoint, EngineLost, HttpEndpoint, events
from sagellm.control_plane.remote import RemoteEngine
from sagellm.engine.base import BaseInferenceEngine, EngineState, GenerateRequest
from sagellm.engine.stats import EngineLoad
from sagellm.errors import UserError
from sagellm.schemas import KVCacheSchema, QuantizationProfile
from sagellm.target import CapabilityDescriptor

PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": "Say something."}]
CHECK_SECONDS = 120.0
HEALTH_SECONDS = 3.0
IDLE_SECONDS = 20.0
"""Within which a server has noticed that its client is gone."""
AT_ONCE = 8


class Skipped(Exception):
    """The engine says itself that it cannot do this."""


class Broken(Exception):
    """A promise that was not kept, in one line."""


@define
class Result:
    """Of one check."""

    promise: str
    outcome: str
    """`kept`, `broken` or `not offered`."""
    detail: str
    seconds: float


Check = Callable[[Any], Awaitable[str | None]]


@frozen
class Suite:
    """Checks in their order; each one's docstring is the promise."""

    checks: tuple[Check, ...]

    async def run(self, subject: Any) -> list[Result]:
        return [await _one(check, subject) for check in self.checks]


async def _one(check: Check, subject: Any) -> Result:
    began = time.perf_counter()
    try:
        detail = await asyncio.wait_for(check(subject), CHECK_SECONDS)
        outcome = "kept"
    except Skipped as why:
        outcome, detail = "not offered", str(why)
    except Broken as why:
        outcome, detail = "broken", str(why)
    except TimeoutError:
        outcome, detail = "broken", f"no answer within {CHECK_SECONDS:g} s"
    except Exception as error:
        outcome, detail = "broken", f"{type(error).__name__}: {error}".splitlines()[0]
    return Result((check.__doc__ or "").strip(), outcome, detail or "", time.perf_counter() - began)


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Broken(otherwise)


def _greedy(tokens: int = 12, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, **more)


# an engine, as an object


async def _ready(engine: BaseInferenceEngine) -> str:
    """After start() it is READY, and health() says so within 3 s."""
    began = time.perf_counter()
    health = await engine.health()
    took = time.perf_counter() - began
    require(health.ready and engine.state is EngineState.READY, f"state {engine.state}, health {health}")
    require(took < HEALTH_SECONDS, f"health took {took:.1f} s")
    require(bool(engine.engine_id and engine.model_id), "engine_id or model_id is empty")
    return engine.model_id


async def _capability(engine: BaseInferenceEngine) -> str:
    """get_capability() is a document that survives JSON."""
    capability = engine.get_capability()
    again = CapabilityDescriptor.from_json(capability.to_json())
    require(again == capability, "it is another one behind JSON")
    return f"{capability.backend}, {capability.max_sequence_length} tokens"


async def _kv_schema(engine: BaseInferenceEngine) -> str:
    """get_kv_schema() is a document that survives JSON, whose bytes are positive."""
    try:
        schema = engine.get_kv_schema()
    except UserError as error:
        raise Skipped(str(error)) from error
    require(KVCacheSchema.from_json(schema.to_json()) == schema, "it is another one behind JSON")
    require(schema.bytes_per_block > 0, "a block has no bytes")
    return f"{schema.dtype}, {schema.block_size} tokens a block"


async def _generates(engine: BaseInferenceEngine) -> str:
    """generate() gives text within max_tokens, and the same greedy text twice."""
    results = [await engine.generate(GenerateRequest(prompt=PROMPT, sampling=_greedy())) for _ in range(2)]  # type: ignore[misc]
    first, second = results
    require(first.text == second.text, f"{first.text!r}, then {second.text!r}")
    require(first.finish_reason in ("stop", "length"), f"finish_reason is {first.finish_reason!r}")
    require(len(first.token_ids) <= 12, f"{len(first.token_ids)} tokens of 12")
    require(first.prompt_tokens > 0, "prompt_tokens is 0")
    return repr(first.text[:40])


async def _streams(engine: BaseInferenceEngine) -> str:
    """stream() gives the same text in pieces, whose indices follow one another, and ends with a finish reason."""
    whole = await engine.generate(GenerateRequest(prompt=PROMPT, sampling=_greedy()))  # type: ignore[misc]
    found = [event async for event in engine.stream(GenerateRequest(prompt=PROMPT, sampling=_greedy()))]
    require("".join(event.text for event in found) == whole.text, "its text differs from generate's")
    index = 0
    for event in found:
        require(event.index == index, f"index {event.index} where {index} follows")
        index += len(event.ids)
    require(found[-1].finish_reason in ("stop", "length"), f"it ends with {found[-1].finish_reason!r}")
    require(all(e.finish_reason is None for e in found[:-1]), "a finish reason before the end")
    return f"{len(found)} pieces"


async def _at_once(engine: BaseInferenceEngine) -> str:
    """Requests at the same time get what they get alone."""
    prompts = [f"{PROMPT} {word}" for word in ("a", "the", "one", "some", "two", "no", "every", "this")]
    alone = [
        (await engine.generate(GenerateRequest(prompt=p, sampling=_greedy()))).text  # type: ignore[misc]
        for p in prompts
    ]
    together = await asyncio.gather(
        *(engine.generate(GenerateRequest(prompt=p, sampling=_greedy())) for p in prompts)  # type: ignore[arg-type]
    )
    wrong = sum(one != other.text for one, other in zip(alone, together))
    require(wrong <= AT_ONCE // 4, f"{wrong} of {AT_ONCE} differ")
    return f"{AT_ONCE - wrong} of {AT_ONCE} the same (rounding may differ with the batch)"


async def _seeds(engine: BaseInferenceEngine) -> str | None:
    """One seed draws one text."""
    how = SamplingParams(max_tokens=12, temperature=1.0, seed=7)
    texts = {
        (await engine.generate(GenerateRequest(prompt=PROMPT, sampling=how))).text  # type: ignore[misc]
        for _ in range(2)
    }
    require(len(texts) == 1, f"two texts: {texts}")


async def _stops(engine: BaseInferenceEngine) -> str | None:
    """A stop string ends the output and is not part of it."""
    text = (await engine.generate(GenerateRequest(prompt=PROMPT, sampling=_greedy()))).text  # type: ignore[misc]
    stop = text[len(text) // 2 :][:3]
    if not stop.strip():
        raise Skipped(f"nothing to stop at in {text!r}")
    cut = await engine.generate(GenerateRequest(prompt=PROMPT, sampling=_greedy(stop=(stop,))))  # type: ignore[misc]
    require(cut.text == text[: text.index(stop)], f"{cut.text!r} of {text!r} with stop {stop!r}")
    require(cut.finish_reason == "stop", f"finish_reason is {cut.finish_reason!r}")


async def _chats(engine: BaseInferenceEngine) -> str:
    """chat() answers a conversation."""
    result = await engine.chat(MESSAGES, _greedy())
    require(result.finish_reason in ("stop", "length"), f"finish_reason is {result.finish_reason!r}")
    return repr(result.text[:40])


async def _streams_chats(engine: BaseInferenceEngine) -> str:
    """chat_prompt() gives what chat() makes of a conversation: stream() of it says the same."""
    prompt = engine.chat_prompt(MESSAGES)
    if prompt is None:
        raise Skipped("it does not tell, so that its chats come in one piece")
    whole = await engine.chat(MESSAGES, _greedy())
    work = GenerateRequest(prompt=prompt, sampling=_greedy())
    text = "".join([event.text async for event in engine.stream(work)])
    require(text == whole.text, f"{text!r} where chat() says {whole.text!r}")
    return f"{len(prompt)} tokens"


async def _embeds(engine: BaseInferenceEngine) -> str:
    """embed() gives a vector of length 1 for each text, in their order."""
    texts = ["a cat", "a dog", "an essay on finance"]
    try:
        vectors = await engine.embed(texts)
    except (UserError, EngineLost) as error:
        raise Skipped(str(error)) from error
    require(vectors.ndim == 2 and len(vectors) == 3, f"the shape is {vectors.shape}")
    require(bool(np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)), "their lengths are not 1")
    alone = (await engine.embed(texts[2:]))[0]
    require(float(vectors[2] @ alone) > 0.999, "the order is not that of the texts")
    return f"{vectors.shape[1]} numbers"


async def _aborts(engine: BaseInferenceEngine) -> str | None:
    """abort() ends a request, with the finish reason abort; of an unknown id it is False."""
    require(not await engine.abort("no-such-request"), "True for an id that nobody has")
    how = SamplingParams(max_tokens=2000, ignore_eos=True, temperature=0)
    longest = engine.get_capability().max_sequence_length
    if longest is not None:
        how = SamplingParams(max_tokens=max(1, longest - 64), ignore_eos=True, temperature=0)
    last, seen = None, 0
    async for event in engine.stream(GenerateRequest(prompt=PROMPT, sampling=how, id="to-abort")):
        last, seen = event, seen + 1
        if seen == 2:
            require(await engine.abort("to-abort"), "False for a request that runs")
    require(
        last is not None and last.finish_reason == "abort", f"it ended with {last and last.finish_reason!r}"
    )


async def _refuses(engine: BaseInferenceEngine) -> str:
    """Bad input raises UserError, in one line, and harms nobody else."""
    longest = engine.get_capability().max_sequence_length
    if longest is None:
        raise Skipped("it tells no longest sequence")
    beside = aiter(engine.stream(GenerateRequest(prompt=PROMPT, sampling=_greedy())))
    last = await anext(beside)
    try:
        await engine.generate(GenerateRequest(prompt=[1] * (longest + 1), sampling=_greedy()))  # type: ignore[misc]
    except UserError as error:
        require("\n" not in str(error), "the refusal has several lines")
        said = str(error)
    else:
        raise Broken("a prompt longer than the longest sequence was taken")
    finally:
        last = [last, *[event async for event in beside]][-1]
    require(
        last.finish_reason in ("stop", "length"), f"a request beside it ended with {last.finish_reason!r}"
    )
    return said[:80]


async def _tells_load(engine: BaseInferenceEngine) -> str:
    """stats() tells what it counts, and nothing is running when nothing was asked."""
    if isinstance(engine, RemoteEngine):
        await engine.refresh()
    load = engine.stats()
    require(isinstance(load, EngineLoad), f"it is a {type(load).__name__}")
    require(load.running in (0, None) and load.waiting in (0, None), f"running {load.running}")
    require(load.generated is None or load.generated > 0, "generated is 0 after all this")
    return f"generated {load.generated}, kv_use {load.kv_use}"


async def _takes_plain_profile(engine: BaseInferenceEngine) -> str | None:
    """load_quant_profile() takes the profile that changes nothing."""
    engine.load_quant_profile(QuantizationProfile())


ENGINE = Suite(
    (
        _ready, _capability, _kv_schema, _generates, _streams, _at_once, _seeds, _stops, _chats, _streams_chats,
        _embeds, _aborts, _refuses, _takes_plain_profile, _tells_load,
    )
)  # fmt: skip


# a server


@frozen
class Server:
    """An engine's HTTP API, as control planes use it."""

    endpoint: Endpoint
    model: str

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        reply = await self.endpoint.send(
            "POST", path, {"model": self.model} | body, {"X-Request-ID": "verify"}
        )
        status = reply.status
        return status, await reply.json()


async def _chat_of_planes(server: Server) -> str | None:
    """A chat request with null and default fields, as SAGE's control planes send it, is answered."""
    message = {"role": "user", "content": "Hello", "name": None}
    body = {"messages": [message], "stream": False, "max_tokens": 4, "logprobs": None, "n": 1}
    status, answer = await server.post("/v1/chat/completions", body)
    require(status == 200, f"{status}: {answer}")
    require(answer["choices"][0]["message"]["role"] == "assistant", "no assistant's message")
    require(answer["usage"]["completion_tokens"] <= 4, f"usage is {answer['usage']}")


async def _text_of_planes(server: Server) -> str | None:
    """So is a text request with theirs."""
    body = {
        "prompt": PROMPT, "max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "stream": False, "n": 1,
        "logprobs": None, "echo": False,
    }  # fmt: skip
    status, answer = await server.post("/v1/completions", body)
    require(status == 200, f"{status}: {answer}")
    require(isinstance(answer["choices"][0]["text"], str), "no text")


async def _sse(server: Server) -> str:
    """A stream is server-sent events, ends with [DONE], and has the usage when asked."""
    body = {
        "model": server.model, "messages": MESSAGES, "max_tokens": 4, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    reply = await server.endpoint.send("POST", "/v1/chat/completions", body)
    require(reply.status == 200, str(reply.status))
    kind = reply.headers.get("content-type", "")
    require(kind.startswith("text/event-stream"), f"its type is {kind!r}")
    chunks = [from_json(data) async for data in events(reply)]
    await reply.aclose()
    require(any(chunk.get("usage") for chunk in chunks), "no chunk has the usage")
    return f"{len(chunks)} chunks"


async def _unknown_model(server: Server) -> str:
    """An unknown model is 404, as an OpenAI error object."""
    status, answer = await server.post(
        "/v1/chat/completions", {"model": "no-such-model", "messages": MESSAGES}
    )
    require(status == 404, f"it is {status}")
    require(isinstance(answer.get("error", answer), dict), f"the body is {answer}")
    return str(answer.get("error", answer).get("message", ""))[:80]


async def _bad_body(server: Server) -> str:
    """A wrong field is a 4xx, and the server goes on."""
    status, _ = await server.post("/v1/chat/completions", {"messages": "hello"})
    require(400 <= status < 500, f"it is {status}")
    reply = await server.endpoint.send("GET", "/health", timeout=HEALTH_SECONDS)
    await reply.read()
    require(reply.status == 200, f"/health is {reply.status} afterwards")
    return str(status)


async def _gone(server: Server) -> str | None:
    """A client that goes away ends its request: the server is idle soon after."""
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": 200, "stream": True, "temperature": 0}
    reply = await server.endpoint.send("POST", "/v1/completions", body)
    async for _ in events(reply):
        break
    await reply.aclose()
    reply = await server.endpoint.send("GET", "/metrics", timeout=HEALTH_SECONDS)
    text = (await reply.read()).decode(errors="replace")
    if reply.status != 200 or "running" not in text:
        raise Skipped("its metrics do not tell what runs")
    limit = time.monotonic() + IDLE_SECONDS
    while any(_running(text)):
        require(time.monotonic() < limit, f"it still runs {IDLE_SECONDS:g} s later")
        await asyncio.sleep(0.2)
        reply = await server.endpoint.send("GET", "/metrics", timeout=HEALTH_SECONDS)
        text = (await reply.read()).decode(errors="replace")


def _running(text: str) -> Iterator[bool]:
    for line in text.splitlines():
        if not line.startswith("#") and "running" in line.partition("{")[0].partition(" ")[0]:
            yield float(line.rsplit(" ", 1)[-1]) > 0


SERVER = Suite((_chat_of_planes, _text_of_planes, _sse, _unknown_model, _bad_body, _gone))


def load(place: str) -> BaseInferenceEngine:
    """`http://...`, or `module:object`, which is an engine or makes one. Raises UserError."""
    if place.startswith(("http://", "https://")):
        return RemoteEngine(HttpEndpoint(place.removesuffix("/").removesuffix("/v1")), engine_id="verified")
    module, _, name = place.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{place!r} was not found ({error}); accepted: a URL, or module:object") from error
    engine = found() if callable(found) and not isinstance(found, BaseInferenceEngine) else found
    if not isinstance(engine, BaseInferenceEngine):
        raise UserError(f"{place!r} gives a {type(engine).__name__}; accepted: a BaseInferenceEngine")
    return engine


async def verify(engine: BaseInferenceEngine) -> list[Result]:
    """All promises, of a server its HTTP ones too. The engine is started first, and stopped at the end."""
    await engine.start()
    results = await ENGINE.run(engine)
    if isinstance(engine, RemoteEngine):
        results += await SERVER.run(Server(engine.endpoint, engine.model_id))
    await engine.stop()
    return results + await STOPPED.run(engine)


async def _stopped(engine: BaseInferenceEngine) -> str:
    """After stop() it is STOPPED and takes nothing."""
    require(engine.state is EngineState.STOPPED, f"state {engine.state}")
    health = await engine.health()
    require(not health.ready, "health says that it is ready")
    try:
        await engine.generate(GenerateRequest(prompt=PROMPT, sampling=_greedy()))  # type: ignore[misc]
    except UserError as error:
        return str(error)[:80]
    raise Broken("a request was taken")


STOPPED = Suite((_stopped,))
