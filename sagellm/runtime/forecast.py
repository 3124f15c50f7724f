"""How much KV memory the running sequences will need before they end: what admission goes by.

The idea of asking for the peak over the future, with output lengths drawn from what was seen, is that of Gong et al.,
"Past-Future Scheduler for LLM Serving under SLA Guarantees" (ASPLOS 2025).
"""

from __future__ import annotations

import numpy as np

REMEMBERED = 1024
ENOUGH = 32
"""Fewer outputs seen say nothing; until then every sequence is expected to reach its limit."""
RENEW = 32


class Hope:
    """How much of the memory a forecast may fill: more while all goes well, less when a sequence had to give way.

    It comes to rest where one sequence in RARE gives way: at the forecast's own spread, whatever that is.
    """

    RARE = 25
    STEP = 0.001

    def __init__(self):
        self.part = 1.0

    def fulfilled(self) -> None:
        """A sequence ended."""
        self.part = min(1.2, self.part + self.STEP)

    def disappointed(self) -> None:
        """A sequence had to give way."""
        self.part = max(0.8, self.part - self.STEP * self.RARE)


class Lengths:
    """Output lengths of the sequences that ended last."""

    def __init__(self):
        self._seen = np.zeros(REMEMBERED, np.int64)
        self._count = 0
        self._sorted = np.zeros(0, np.int64)
        self._mean_above = np.zeros(0)

    def add(self, tokens: int) -> None:
        self._seen[self._count % REMEMBERED] = tokens
        self._count += 1
        if self._count % RENEW == 0:
            self._sorted = np.sort(self._seen[: self._count])
            above = np.cumsum(self._sorted[::-1])[::-1]
            self._mean_above = above / np.arange(len(above), 0, -1)

    def ends(self, prompt: np.ndarray, length: np.ndarray, limit: np.ndarray) -> np.ndarray:
        """Expected final lengths, float [B]: the mean of the outputs seen that were longer, at most the limit."""
        if len(self._sorted) < ENOUGH:
            return limit.astype(np.float64)
        longer = np.searchsorted(self._sorted, length - prompt, side="right")
        known = longer < len(self._sorted)
        expected = prompt + self._mean_above[np.minimum(longer, len(self._sorted) - 1)]
        return np.where(known, np.minimum(expected, limit), limit)


def peak_blocks(length: np.ndarray, end: np.ndarray, credit: np.ndarray, block_size: int) -> float:
    """Most blocks held at one time when each sequence grows by a token a step from `length` to `end`, float [B].

    The most is reached just before one of them ends. `credit` blocks of each are counted with another sequence;
    a sequence's last block is half full on average. Never more than all of them need at their ends.
    """
    order = np.argsort(length - end, kind="stable")
    steps = (end - length)[order]
    alive = np.arange(1, len(order) + 1)
    tokens = np.cumsum(length[order]) + alive * steps
    peak = float((tokens / block_size + alive / 2 - np.cumsum(credit[order])).max())
    return min(peak, float((np.ceil(end / block_size) - credit).sum()))
