"""Counters and times of an engine, from the plans that were executed."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import Any

import numpy as np
from attrs import asdict, define, field, frozen

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
MICROSECONDS = tuple(round(x * 1e-6, 6) for x in (100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6))


@define
class Histogram:
    """How often a time fell between two bounds; seconds."""

    bounds: tuple[float, ...] = SECONDS
    counts: np.ndarray = field(init=False)
    """int64 [bounds + 1]; the last is beyond all bounds."""
    sum: float = 0.0

    def __attrs_post_init__(self) -> None:
        self.counts = np.zeros(len(self.bounds) + 1, np.int64)

    def add(self, values: np.ndarray) -> None:
        at = np.searchsorted(self.bounds, values)
        self.counts += np.bincount(at, minlength=len(self.counts))
        self.sum += float(values.sum())

    def add_one(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def summary(self) -> dict[str, Any]:
        return {
            "count": int(self.counts.sum()),
            "sum": self.sum,
            "bounds": list(self.bounds),
            "counts": self.counts.tolist(),
        }


@define
class Counters:
    """Counted from executed plans."""

    steps: int = 0
    forwarded: int = 0
    """Tokens that went through the model."""
    prompt: int = 0
    """Prompt tokens of the requests that began."""
    shared: int = 0
    """Prompt tokens that did not, because another sequence of the step computed them."""
    recomputed: int = 0
    """Tokens forwarded that had been in the cache before their sequence was put back."""
    generated: int = 0
    verify_steps: int = 0
    """Steps that verified guessed tokens."""
    drafted: int = 0
    """Tokens guessed."""
    accepted: int = 0
    """Of these, the ones that were right."""
    finished: Counter = field(factory=Counter)
    """Finish reason -> sequences."""
    failed_steps: int = 0
    """Plans that raised."""
    checked: Counter = field(factory=Counter)
    """Steps evaluated before and after the passes: `equal` or `different` -> how many."""
    remarks: Counter = field(factory=Counter)
    """(pass, applied) -> how often, over the steps executed and the models compiled."""


@define
class Times:
    """Where time went."""

    ttft: Histogram = field(factory=Histogram)
    """Submission to first token."""
    itl: Histogram = field(factory=Histogram)
    """Between two tokens of a sequence."""
    tpot: Histogram = field(factory=Histogram)
    """Of finished sequences: mean time per token after the first."""
    queue: Histogram = field(factory=Histogram)
    """Submission to the first turn."""
    step: Histogram = field(factory=Histogram)
    host: Histogram = field(factory=lambda: Histogram(MICROSECONDS))
    """A step less the time in model and sampler."""


@frozen(kw_only=True)
class EngineLoad:
    """What those who choose among engines go by. None: the engine does not tell."""

    running: int | None = None
    """Sequences that run."""
    waiting: int | None = None
    """Sequences that wait."""
    kv_use: float | None = None
    """Part of the KV cache that sequences hold."""
    prompt: int | None = None
    """Prompt tokens since its start."""
    generated: int | None = None
    """Tokens generated since its start."""
    reused: int | None = None
    """Prompt tokens found in its prefix cache since its start."""


@frozen(kw_only=True)
class EngineStats(EngineLoad):
    """A snapshot of an engine: counts since its start, gauges of now."""

    running: int
    waiting: int
    kv_use: float
    kv_blocks: int
    kv_blocks_used: int
    """Held by sequences."""
    kv_blocks_cached: int
    """Held by none, kept to be found."""
    host_blocks: int
    host_blocks_used: int
    steps: int
    forwarded: int
    prompt: int
    generated: int
    shared: int
    """Prompt tokens computed by another sequence of the same step."""
    reused: int
    """Known tokens found in the cache."""
    fetched: int
    """Known tokens fetched from host memory."""
    recomputed: int
    verify_steps: int
    """Steps that verified guessed tokens."""
    drafted: int
    """Tokens guessed."""
    accepted: int
    """Of these, the ones that were right."""
    draft_steps: int
    """Forwards of the draft model."""
    evicted: dict[str, int]
    """Why KV blocks left the prefix cache -> how many: a policy that made room, `rewritten`, `reset`."""
    offloaded_blocks: int
    copied_blocks: int
    preemptions: int
    refused: int
    finished: dict[str, int]
    failed_steps: int
    checked: dict[str, int]
    """Steps whose passes were checked against the operations' meaning, by `equal` or `different`."""
    gains: dict[str, float]
    """`pass fact rows` -> median seconds that the fact saved in a step of up to so many rows, as measured; where steps
    give several tokens, for one token of each sequence."""
    plan_hits: int
    plan_misses: int
    remarks: dict[str, dict[str, int]]
    """Pass -> {applied, declined}."""
    times: dict[str, dict[str, Any]]
    """Histogram summaries, seconds; see `Times`."""
    restarts: int = 0
    """Times that the core's process was started again."""

    @property
    def plan_hit_ratio(self) -> float:
        return self.plan_hits / max(1, self.plan_hits + self.plan_misses)

    def mean(self, time: str) -> float:
        """Mean of a histogram, in seconds."""
        return self.times[time]["sum"] / max(1, self.times[time]["count"])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
