"""Runs a workload through an engine's streams and notes when each token came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

import numpy as np
from attrs import frozen

from sagellm.batch import SamplingParams
from sagellm.bench.workload import Arrival
from sagellm.engine.base import GenerateRequest
from sagellm.engine.engine import SageLLMEngine
from sagellm.errors import QueueFull

PERCENTILES = (50, 90, 99)


@frozen
class Served:
    """What one request's client saw; seconds from when it was due, so that waiting for a slow engine counts."""

    prompt: int
    cached: int
    """Prompt tokens found in the KV cache."""
    times: tuple[float, ...]
    """When each token came."""
    refused: bool = False

    @property
    def ttft(self) -> float:
        return self.times[0]

    @property
    def tpot(self) -> float:
        """Mean seconds a token after the first."""
        return (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)

    @property
    def gaps(self) -> np.ndarray:
        return np.diff(self.times)


@frozen
class Run:
    served: list[Served]
    seconds: float
    """From the first request's arrival to the last token."""

    @property
    def done(self) -> list[Served]:
        return [s for s in self.served if not s.refused]

    def summary(self) -> dict[str, float]:
        """Requests, tokens a second, and percentiles in milliseconds."""
        done = self.done
        longer = [s for s in done if len(s.times) > 1]
        prompt = sum(s.prompt for s in done)
        made = sum(len(s.times) for s in done)
        values = {
            "requests": len(done),
            "refused": len(self.served) - len(done),
            "seconds": self.seconds,
            "requests_per_s": len(done) / self.seconds,
            "prompt_tokens_per_s": prompt / self.seconds,
            "output_tokens_per_s": made / self.seconds,
            "cached": sum(s.cached for s in done) / max(1, prompt),
        }
        times = {
            "ttft": [s.ttft for s in done],
            "tpot": [s.tpot for s in longer],
            "itl": np.concatenate([s.gaps for s in longer]) if longer else [],
            "e2e": [s.times[-1] for s in done],
        }
        for name, some in times.items():
            values |= percentiles(name, some)
        return values


def percentiles(name: str, seconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    if not len(seconds):
        return {}
    some = np.percentile(np.asarray(seconds) * 1e3, PERCENTILES)
    return {f"{name}_p{p}_ms": float(value) for p, value in zip(PERCENTILES, some)}


async def _client(engine: SageLLMEngine, arrival: Arrival, start: float) -> Served:
    due = start + arrival.at
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    how = SamplingParams(max_tokens=arrival.output, ignore_eos=True)
    stream = engine.stream(GenerateRequest(prompt=arrival.prompt, sampling=how))
    times: list[float] = []
    try:
        async for event in stream:
            times += [time.perf_counter() - due] * len(event.ids)
    except QueueFull:
        return Served(len(arrival.prompt), 0, (), refused=True)
    if stream.result.error:
        raise RuntimeError(stream.result.error)
    return Served(len(arrival.prompt), stream.result.cached_tokens, tuple(times))


async def _serve(engine: SageLLMEngine, arrivals: Iterable[Arrival]) -> Run:
    start = time.perf_counter()
    served = await asyncio.gather(*(_client(engine, arrival, start) for arrival in arrivals))
    return Run(served, time.perf_counter() - start)


def serve(engine: SageLLMEngine, arrivals: Iterable[Arrival]) -> Run:
    """Send each request when it is due, and read every stream to its end."""
    return asyncio.run(_serve(engine, arrivals))
