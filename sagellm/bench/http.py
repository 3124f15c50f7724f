"""What HTTP costs: the same streams through a server and from an engine in this process, in turns.

Another server of OpenAI's API may be beside them; which model it has, and what it computes, is its own affair.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
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


def served_at(address: str) -> str:
    """The model that a server has; the first where it has several."""
    try:
        with urllib.request.urlopen(f"{address}/v1/models", timeout=10) as answer:
            return json.load(answer)["data"][0]["id"]
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"beside is {address!r}: {error}; accepted: a server of OpenAI's API") from None


def compare(
    config: EngineConfig,
    streams: int,
    prompt: tuple[int, int],
    output: tuple[int, int],
    pairs: int,
    beside: str | None = None,
) -> dict[str, float]:
    """Medians of tokens a second, and of ratios within a pair; all sides get fresh prompts, the same ones.

    `beside` is another server's address: ours over it is `to_beside`.
    """
    rates: dict[str, list[float]] = {"engine": [], "server": []} | ({"beside": []} if beside else {})
    other = served_at(beside) if beside else ""
    with server(config) as (model, address), SageLLMEngine(config=config) as engine:
        run: dict[str, Callable[[Sequence[Arrival]], float]] = {
            "server": lambda some: through_http(address, model, some),
            "engine": lambda some: in_process(engine, some),
            "beside": lambda some: through_http(str(beside), other, some),
        }
        for pair in range(pairs + 1):
            arrivals = uniform(streams, 0, prompt, output, engine.vocab_size, seed=pair)
            for name in list(rates)[:: -1 if pair % 2 else 1]:
                rate = run[name](arrivals)
                if pair:  # the first compiles and warms up
                    rates[name].append(rate)

    def ratio(name: str, label: str) -> dict[str, float]:
        found = [ours / theirs for ours, theirs in zip(rates["server"], rates[name])]
        least, most = (f"{label}_least", f"{label}_most") if label != "ratio" else ("least", "most")
        return {label: statistics.median(found), least: min(found), most: max(found)}

    measured = {f"{name}_tokens_per_s": statistics.median(found) for name, found in rates.items()}
    measured = {"streams": streams, "pairs": pairs} | measured | ratio("engine", "ratio")
    return measured | (ratio("beside", "to_beside") if beside else {})
