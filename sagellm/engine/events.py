"""What a step tells: columns of tokens, and the few things that happen to single requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from attrs import field, frozen

REASONS = (None, "stop", "length", "error")
"""Finish reasons by their number in `StepEvents.reasons`."""
STOP, LENGTH, ERROR = 1, 2, 3

Top = tuple[tuple[int, float], ...]
"""Likeliest tokens and their logprobs, best first."""


@frozen
class Token:
    """One token of one sample of a request."""

    request_id: str
    index: int
    """Position among the sample's output tokens, from 0."""
    token: int
    finish_reason: str | None = None
    """`stop` (an end token), `length`, or None while it goes on; `error` has the token -1."""
    logprob: float | None = None
    top: Top = ()
    sample: int = 0
    error: str = ""
    """Why the request failed."""


@frozen
class Began:
    """A sequence got its turn."""

    number: int
    sample: int
    cached: int
    """Known tokens whose keys and values were found."""
    miss: str
    """Why the first block that was not found is not there."""
    queued: float
    """Seconds it waited."""


@frozen
class Failed:
    number: int
    sample: int
    message: str


@frozen
class StepEvents:
    """One step. Arrays [R], one entry per token; requests by their number."""

    numbers: np.ndarray
    """int64"""
    samples: np.ndarray
    """int64"""
    indices: np.ndarray
    """int32: position of the token among the sample's outputs."""
    tokens: np.ndarray
    """int64"""
    reasons: np.ndarray
    """int8, see REASONS."""
    logprobs: Mapping[int, tuple[float, Top]] = field(factory=dict)
    """By entry, where they were asked for."""
    prompt_logprobs: Mapping[int, list[tuple[int, float, Top]]] = field(factory=dict)
    """By request number: (position, logprob, top) of prompt tokens, in order."""
    began: list[Began] = field(factory=list)
    failed: list[Failed] = field(factory=list)
    vectors: Mapping[int, np.ndarray] = field(factory=dict)
    """By request number: float32 [hidden] of prompts that ended with it."""

    COLUMNS = ("numbers", "samples", "indices", "tokens", "reasons")

    def __len__(self) -> int:
        return len(self.numbers)

    def events(self, names: Mapping[int, str]) -> Iterator[Token]:
        """One by one; `names` are the requests' ids by number."""
        columns = (getattr(self, name) for name in self.COLUMNS)
        for i, (number, sample, index, token, reason) in enumerate(zip(*(c.tolist() for c in columns))):
            logprob, top = self.logprobs.get(i, (None, ()))
            yield Token(names[number], index, token, REASONS[reason], logprob, top, sample)
        for failed in self.failed:
            yield Token(names[failed.number], -1, -1, "error", sample=failed.sample, error=failed.message)


NOTHING = StepEvents(*(np.zeros(0, t) for t in (np.int64, np.int64, np.int32, np.int64, np.int8)))
