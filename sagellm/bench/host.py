"""The engine's own work in a step: microseconds and counted calls, on a device that computes nothing."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable

from sagellm.batch import Request, SamplingParams
from sagellm.config import EngineConfig
from sagellm.engine.core import EngineCore

COUNTED = 20
"""Steps whose calls are counted; counting slows them, so they are not timed."""


def decoding(rows: int, length: int, **how: object) -> EngineCore:
    """A core on the null backend with so many sequences in steady decode."""
    settings = {"max_sequences": rows, "max_batched_tokens": 8 * rows, "max_length": length}
    core = EngineCore(EngineConfig(model="builtin", target="null", **settings))
    sampling = SamplingParams(max_tokens=length - 8, ignore_eos=True, **how)
    for index in range(rows):
        core.submit(Request(str(index), [5 + index % 90, 7 + index // 90, 9][: 1 + index % 3], sampling))
    for _ in range(3):
        core.advance()
    return core


def calls(function: Callable[[], object]) -> int:
    """Calls of Python and of C functions in this thread: the same on every machine."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    collects = gc.isenabled()
    gc.disable()  # what a collection happens to call has nothing to do with it
    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
        if collects:
            gc.enable()
    return count


def steady(rows: int, steps: int) -> dict[str, float]:
    """Scheduling, deciding, lowering, lookup, binding, commit and reporting of `steps` decode steps."""
    core = decoding(rows, steps + COUNTED + 16)
    gc.collect()
    gc.freeze()  # as a core in a process of its own does
    hits, seconds = core.compiler.counts.hits, []
    for _ in range(steps):
        began = time.perf_counter()
        core.advance()
        seconds.append(time.perf_counter() - began)
    found = (core.compiler.counts.hits - hits) / steps
    gc.unfreeze()
    return {
        "sequences": rows,
        "median_us": statistics.median(seconds) * 1e6,
        "best_us": min(seconds) * 1e6,
        "calls": statistics.mean(calls(core.advance) for _ in range(COUNTED)),
        "plan_hits": found,
    }
