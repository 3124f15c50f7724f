"""Exchanges with an engine's own server, recorded once and replayed in tests where the engine is not installed.

python tests/control_plane/recording.py vllm http://127.0.0.1:8001
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from sagellm.batch import SamplingParams
from sagellm.control_plane.adapters import adapter
from sagellm.control_plane.endpoint import Endpoint, HttpEndpoint, Reply
from sagellm.control_plane.remote import RemoteEngine
from sagellm.engine.base import GenerateRequest
from sagellm.errors import UserError

FOLDER = Path(__file__).parent / "exchanges"
PROMPT = "Once upon a time"
ASKED = [{"role": "user", "content": "Hello!"}]


async def drive(engine: RemoteEngine) -> dict[str, Any]:
    """Whatever an adapter asks of its server but an abort; what comes of it, by name."""

    def few(prompt: Any = PROMPT, **how: Any) -> GenerateRequest:
        return GenerateRequest(prompt=prompt, sampling=SamplingParams(max_tokens=6, **how))

    async def said(path: str, body: dict) -> tuple[int, Any]:
        reply = await engine.endpoint.send("POST", path, body)
        return reply.status, await reply.json()

    async def refused(request: GenerateRequest) -> str:
        try:
            await engine.generate(request)
        except UserError as error:
            return str(error)
        raise AssertionError("it was not refused")

    await engine.start()
    return {
        "health": await engine.health(),
        "model": engine.model_id,
        "longest": engine.get_capability().max_sequence_length,
        "chat": await engine.chat(ASKED, SamplingParams(max_tokens=6)),
        "text": await engine.generate(few()),
        "ids": await engine.generate(few([5, 6, 7])),
        "stop": await engine.generate(few(stop=" ")),
        "stream": [event async for event in engine.stream(few())],
        "two": [event async for event in engine.stream(few(n=2, temperature=1.0, seed=1))],
        "regex": await engine.generate(few(grammar={"regex": "[ab]{3}"})),
        "guided": await said(
            "/v1/completions",
            {"model": engine.model_id, "prompt": PROMPT, "max_tokens": 6, "guided_choice": ["yes", "no"]},
        ),
        "unknown model": await said("/v1/completions", {"model": "nobody", "prompt": PROMPT}),
        "too long": await refused(GenerateRequest(prompt=PROMPT, sampling=SamplingParams(max_tokens=10**6))),
        "load": await engine.refresh(),
    }


class Recorder(Endpoint):
    """Notes what is asked and what `server` answers."""

    def __init__(self, server: Endpoint):
        self.server, self.seen = server, []

    async def send(self, method, path, body=None, headers=None, timeout=None) -> Reply:
        reply = await self.server.send(method, path, body, headers, timeout)
        said = (await reply.read()).decode()
        kind = reply.headers.get("content-type", "").partition(";")[0]
        answer = json.loads(said) if kind == "application/json" else said.split("\n")
        if path == "/metrics":  # buckets, and what is Python's own, say nothing here
            answer = [line for line in answer if "_bucket{" not in line and line[:1] != "#"]
            answer = [line for line in answer if not line.startswith(("python_", "process_", "http_"))]
        asked = {"method": method, "path": path, "body": body}
        self.seen.append(asked | {"status": reply.status, "type": kind, "answer": answer})
        return reply_of(self.seen[-1])

    async def aclose(self) -> None:
        await self.server.aclose()


class Replay(Endpoint):
    """Answers each request as the one was answered that was the same when it was recorded."""

    def __init__(self, kind: str):
        self.seen = json.loads((FOLDER / f"{kind}.json").read_text("utf-8"))

    async def send(self, method, path, body=None, headers=None, timeout=None) -> Reply:
        asked = {"method": method, "path": path, "body": body}
        for one in self.seen:
            if asked.items() <= one.items():
                return reply_of(one)
        raise AssertionError(f"not recorded: {asked}")

    async def aclose(self) -> None:
        return None


def reply_of(one: dict[str, Any]) -> Reply:
    async def pieces() -> AsyncIterator[bytes]:
        answer = one["answer"]
        yield (json.dumps(answer) if one["type"] == "application/json" else "\n".join(answer)).encode()

    async def close() -> None:
        return None

    return Reply(one["status"], {"content-type": one["type"]}, pieces(), close)


async def record(kind: str, address: str) -> None:
    recorder = Recorder(HttpEndpoint(address))
    for name, what in (await drive(adapter(kind)(recorder))).items():
        print(f"{name:<16}{what}")
    await recorder.aclose()
    (FOLDER / f"{kind}.json").write_text(
        json.dumps(recorder.seen, indent=1, ensure_ascii=False) + "\n", "utf-8"
    )


if __name__ == "__main__":
    asyncio.run(record(*sys.argv[1:]))
