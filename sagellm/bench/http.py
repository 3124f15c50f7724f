"""What HTTP costs: the same streams through a server and from an engine in this process, in turns."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from attrs import asdict

from sagellm.bench.measure import serve
from sagellm.bench.workload import Arrival, uniform
from sagellm.config import EngineConfig
from sagellm.engine.engine import SageLLMEngine
from sagellm.errors import UserError

READY = re.compile(r"ready: (.+) on (\S+) at (http://[^/]+)/v1")


@contextmanager
def server(config: EngineConfig) -> Iterator[tuple[str, str]]:
    """`sagellm serve` with these settings in a process of its own: the model's name and the address."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "engine.yaml"
        settings = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(config).items()}
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        command = [sys.executable, "-m", "sagellm", "serve", "--port", "0", "--config", str(file)]
        process = subprocess.Popen([*command, "--core", config.core], stderr=subprocess.PIPE, text=True)
        said = []
        try:
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line)
                if found := READY.match(line):
                    break
            else:
                raise UserError(f"the server ended while it started: {''.join(said).strip()}")
            yield found[1], found[3]
        finally:
            process.terminate()
            process.wait(30)


async def _stream(address: str, model: str, arrival: Arrival) -> int:
    """Read one stream to its end, as cheaply as a client can; tokens by its usage."""
    asked = {
        "model": model, "prompt": arrival.prompt, "max_tokens": arrival.output, "ignore_eos": True,
        "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    body, where = json.dumps(asked).encode(), urlsplit(address)
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=2**24)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    answer = await reader.read(-1)
    writer.close()
    found = re.search(rb'"completion_tokens":(\d+)', answer)
    if not found or b"data: [DONE]" not in answer:
        raise RuntimeError(f"the server answered {answer[:500]!r}")
    return int(found[1])


def through_http(address: str, model: str, arrivals: Sequence[Arrival]) -> float:
    """Tokens a second of streams that begin at once."""

    async def all_of_them() -> int:
        return sum(await asyncio.gather(*(_stream(address, model, one) for one in arrivals)))

    began = time.perf_counter()
    made = asyncio.run(all_of_them())
    return made / (time.perf_counter() - began)


def in_process(engine: SageLLMEngine, arrivals: Sequence[Arrival]) -> float:
    run = serve(engine, arrivals)
    return sum(len(one.times) for one in run.served) / run.seconds


def compare(
    config: EngineConfig, streams: int, prompt: tuple[int, int], output: tuple[int, int], pairs: int
) -> dict[str, float]:
    """Medians of tokens a second, and of the ratio within a pair; both sides get fresh prompts, the same ones."""
    ours, theirs = [], []
    with server(config) as (model, address), SageLLMEngine(config=config) as engine:
        for pair in range(pairs + 1):
            arrivals = uniform(streams, 0, prompt, output, engine.vocab_size, seed=pair)
            turns = [
                (ours, lambda some=arrivals: through_http(address, model, some)),
                (theirs, lambda some=arrivals: in_process(engine, some)),
            ]
            for made, run in turns if pair % 2 else reversed(turns):
                rate = run()
                if pair:  # the first compiles and warms up
                    made.append(rate)
    ratios = [a / b for a, b in zip(ours, theirs)]
    return {
        "streams": streams,
        "pairs": pairs,
        "server_tokens_per_s": statistics.median(ours),
        "engine_tokens_per_s": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }
