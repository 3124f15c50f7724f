"""One request at a time, and a short one that comes while a long prompt is being prefilled."""

from __future__ import annotations

import time

import numpy as np

from sagellm.batch import SamplingParams
from sagellm.bench.measure import Run, serve
from sagellm.bench.workload import FIRST_TOKEN, Arrival, uniform
from sagellm.engine.engine import SageLLMEngine
from sagellm.errors import UserError

SHORT = 5
"""Tokens of the short prompt."""


def alone(engine: SageLLMEngine, prompt: int, output: int, repeats: int, vocabulary: int) -> Run:
    """Requests of these lengths, each after the one before; all prompts differ."""
    some = uniform(repeats + 1, 0, (prompt, prompt), (output, output), vocabulary, seed=0)
    runs = [serve(engine, [arrival]) for arrival in some]
    return Run([s for run in runs[1:] for s in run.served], sum(run.seconds for run in runs[1:]))


def behind(engine: SageLLMEngine, long: int, repeats: int, vocabulary: int) -> dict[str, float]:
    """Median milliseconds of prefilling a prompt of `long` tokens, of a short one alone, and of a short one that comes
    in the middle of the long one's prefill."""
    limit = engine.config.max_length
    if limit is not None and long >= limit:
        raise UserError(f"--behind is {long}; accepted: less than --max-length {limit}")
    random = np.random.default_rng(1)

    def prompt(length: int) -> list[int]:
        return random.integers(FIRST_TOKEN, vocabulary, length).tolist()

    def first(length: int) -> float:
        return serve(engine, [Arrival(0.0, prompt(length), 1)]).served[0].ttft

    first(long)
    longs, shorts, interrupted = [], [], []
    for _ in range(repeats):
        longs.append(first(long))
        shorts.append(first(SHORT))
        stream = engine.stream(prompt(long), SamplingParams(max_tokens=1, ignore_eos=True))
        time.sleep(longs[-1] / 3)
        interrupted.append(first(SHORT))
        stream.wait()
    medians = np.median([longs, shorts, interrupted], axis=1) * 1e3
    names = (f"ttft_{long}_tokens_ms", f"ttft_{SHORT}_tokens_ms", f"ttft_{SHORT}_tokens_behind_ms")
    return dict(zip(names, medians.tolist()))
