"""What is learned of an engine from the requests it served."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
from attrs import Factory, define, field

KEEP = 0.95
"""Weight that an observation keeps when the next one comes."""
PROMPT_TOKEN, NEXT_TOKEN = 1e-4, 0.02
"""Seconds that are assumed as long as no engine was seen."""
ALIKE = 10
"""Observations that it takes until an engine is believed to differ from its kind as much as it seems to."""


@define
class Line:
    """y = start + slope * x by least squares over what was seen lately; neither is below 0.

    Where all x were alike, it is told from one point: `flat` lines have no slope then, others no start.
    """

    flat: bool
    start: float = 0.0
    slope: float = 0.0
    seen: float = 0.0
    """Sum of the weights."""
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def at(self, x: float) -> float:
        return self.start + self.slope * x

    def add(self, x: float, y: float) -> None:
        self.seen = KEEP * self.seen + 1
        self._x = KEEP * self._x + x
        self._y = KEEP * self._y + y
        self._xx = KEEP * self._xx + x * x
        self._xy = KEEP * self._xy + x * y
        spread = self._xx - self._x * self._x / self.seen
        if spread > 1e-4 * self._xx:
            self.slope = max(0.0, (self._xy - self._x * self._y / self.seen) / spread)
        else:
            self.slope = 0.0 if self.flat or not self._x else self._y / self._x
        self.start = (self._y - self.slope * self._x) / self.seen
        if self.start < 0:
            self.start, self.slope = 0.0, self._xy / self._xx


@define
class Mean:
    """Of what was seen lately; `prior` counts as so many observations of the first value."""

    value: float = 0.0
    prior: float = 0.0
    _seen: float = 0.0
    _sum: float = 0.0
    _first: float = field(default=Factory(lambda self: self.value, takes_self=True), init=False)

    def add(self, value: float) -> None:
        self._seen = KEEP * self._seen + 1
        self._sum = KEEP * self._sum + value
        self.value = (self._sum + self.prior * self._first) / (self._seen + self.prior)


class Speeds:
    """How fast engines are, by kinds of engines: those with the same model, of the same kind, on the same device.

    A kind learns from all its engines, so an engine that got no requests lately is not judged by old ones; what one
    differs by is a factor of its own. A kind of which nothing was seen is taken to be as fast as the fastest.
    Arrays [kinds].
    """

    def __init__(self) -> None:
        self._kinds: dict[Hashable, int] = {}
        self._ttft: list[Line] = []
        self._tpot: list[Line] = []
        self.known = np.zeros((2, 0), np.bool_)
        """Whether the first token, and whether the time between two, was seen."""
        self.unseen = 0
        self.table = np.zeros((4, 0))
        """Seconds to a first token, beside those for each prompt token up to it; seconds to a next token, beside those
        for each request there."""

    def kind(self, of: Hashable) -> int:
        """Its index."""
        if of not in self._kinds:
            self._kinds[of] = len(self._kinds)
            self._ttft.append(Line(flat=False))
            self._tpot.append(Line(flat=True))
            self.known = np.concatenate([self.known, np.zeros((2, 1), np.bool_)], axis=1)
            self.table = np.concatenate([self.table, np.zeros((4, 1))], axis=1)
            self._guess()
        return self._kinds[of]

    def first(self, kind: int, tokens: float, seconds: float) -> float:
        """A first token came behind so many prompt tokens. Returns the time over the one predicted."""
        line = self._ttft[kind]
        expected = line.at(tokens) if self.known[0, kind] else seconds
        line.add(tokens, seconds)
        self.table[:2, kind] = line.start, line.slope
        self._seen(0, kind)
        return seconds / expected if expected > 0 else 1.0

    def each(self, kind: int, requests: float, seconds: float) -> float:
        """Tokens came so many seconds apart, among so many requests. Returns the time over the one predicted."""
        line = self._tpot[kind]
        expected = line.at(requests) if self.known[1, kind] else seconds
        line.add(requests, seconds)
        self.table[2:, kind] = line.start, line.slope
        self._seen(1, kind)
        return seconds / expected if expected > 0 else 1.0

    def _seen(self, what: int, kind: int) -> None:
        self.known[what, kind] = True
        if self.unseen:
            self._guess()

    def _guess(self) -> None:
        for known, column, default in (
            (self.known[0], self.table[1], PROMPT_TOKEN),
            (self.known[1], self.table[2], NEXT_TOKEN),
        ):
            column[~known] = column[known].min() if known.any() else default
        self.unseen = int((~self.known).sum())
