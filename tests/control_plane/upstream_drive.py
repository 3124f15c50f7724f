"""SAGE's own control plane and gateway drive an engine: run by an interpreter that has them, prints what came as JSON.

python upstream_drive.py http 127.0.0.1 8901 MODEL
python upstream_drive.py object
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from sagellm_control import ControlPlaneManager
from sagellm_gateway import create_app
from sagellm_protocol import DecodingStrategy, Request, SamplingParams

PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": "你好"}]
GREEDY = {"max_tokens": 8, "temperature": 0}


def ask(name: str, **given: Any) -> Request:
    return Request(request_id=name, trace_id=f"trace-{name}", **{"max_tokens": 8, "temperature": 0.0} | given)


async def outcome(work: Awaitable[Any]) -> Any:
    """As JSON has it; what was raised is {"raised": its text}."""
    try:
        found = await work
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}
    return found.model_dump(mode="json") if hasattr(found, "model_dump") else found


async def listed(events: Any) -> list[dict[str, Any]]:
    return [event.model_dump(mode="json") async for event in events]


async def is_ready(manager: ControlPlaneManager, name: str, seconds: float = 60) -> str:
    for _ in range(int(seconds * 20)):
        if manager.get_engine(name).state.value == "READY":
            break
        await asyncio.sleep(0.05)
    return manager.get_engine(name).state.value


async def asked(manager: ControlPlaneManager, model: str, add_vectors: Callable[[], Any]) -> dict[str, Any]:
    """What its own callers ask of a manager, and clients of its gateway.

    An engine for embeddings comes last, as it would get conversations too: the manager goes by the model's name alone.
    """
    found: dict[str, Any] = {
        "chat": await outcome(manager.execute_request(ask("c", model=model, messages=MESSAGES))),
        "text": await outcome(manager.execute_request(ask("t", model=model, prompt=PROMPT))),
        "again": await outcome(manager.execute_request(ask("a", model=model, messages=MESSAGES))),
        "stream": await outcome(
            listed(manager.stream_request(ask("s", model=model, messages=MESSAGES, stream=True)))
        ),
    }
    app = create_app(control_plane=manager)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:

        async def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
            answer = await client.post(path, json={"model": model} | body)
            return {"status": answer.status_code, "body": answer.json() if answer.is_success else answer.text}

        async def streamed() -> list[str]:
            body = {"model": model, "messages": MESSAGES, "stream": True} | GREEDY
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                return [line async for line in answer.aiter_lines() if line.startswith("data: ")]

        async with app.router.lifespan_context(app):
            found["gateway"] = {
                "models": (await client.get("/v1/models")).json(),
                "chat": await outcome(post("/v1/chat/completions", {"messages": MESSAGES} | GREEDY)),
                "text": await outcome(post("/v1/completions", {"prompt": PROMPT} | GREEDY)),
                "stream": await outcome(streamed()),
            }
            add_vectors()
            found["vectors"] = await is_ready(manager, "vectors")
            found["embeddings"] = await outcome(manager.get_embeddings(["one", "two"], model_id=model))
            body = {"input": ["one", "two"]}
            found["gateway"]["embeddings"] = await outcome(post("/v1/embeddings", body))
    return found


async def over_http(host: str, port: str, model: str) -> dict[str, Any]:
    manager = ControlPlaneManager(health_check_interval_s=0.3)
    await manager.start()
    manager.register_engine("one", model, host, int(port))
    state = await is_ready(manager, "one")
    found = await asked(
        manager,
        model,
        lambda: manager.register_engine("vectors", model, host, int(port), engine_kind="embedding"),
    )
    await manager.stop()
    return found | {"one": state}


async def as_object() -> dict[str, Any]:
    from sagellm.control_plane.upstream import ProtocolEngine
    from sagellm.engine.engine import SageLLMEngine

    with SageLLMEngine("builtin", dtype="float32", max_length=512) as engine:
        # not started: it would look for objects at http://local:0, and give them up
        manager, model, one = ControlPlaneManager(), engine.model_id, ProtocolEngine(engine)
        manager.register_engine("one", model, llm_engine=one)
        sampling = SamplingParams(
            strategy=DecodingStrategy.SAMPLING, temperature=1.0, seed=7, stop_sequences=["\n"]
        )
        drawn = {"temperature": None, "sampling_params": sampling, "max_tokens": 16}
        beams = drawn | {"sampling_params": SamplingParams(strategy=DecodingStrategy.BEAM_SEARCH)}
        stream = one.stream(ask("left", prompt=PROMPT, max_tokens=400, stream=True))
        async for event in stream:
            if event.event == "delta":
                break
        await stream.aclose()
        while engine.stats().running:
            await asyncio.sleep(0.01)
        found = {
            "direct": (await engine.chat(MESSAGES, _sampling())).text,
            "drawn": [await outcome(one.execute(ask(f"d{i}", prompt=PROMPT, **drawn))) for i in range(2)],
            "beams": await outcome(one.execute(ask("b", prompt=PROMPT, **beams))),
            "phase": await outcome(listed(one.stream(ask("p", prompt=PROMPT, phase="prefill")))),
            "empty": await outcome(one.execute(ask("e"))),
            "too long": await outcome(listed(one.stream(ask("l", prompt="word " * 2000, stream=True)))),
        }
        return found | await asked(
            manager,
            model,
            lambda: manager.register_engine("vectors", model, engine_kind="embedding", engine=one),
        )


def _sampling() -> Any:
    from sagellm.batch import SamplingParams as Ours

    return Ours(max_tokens=8)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    work = {"http": over_http, "object": as_object}[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(asyncio.run(work)))
