"""What is learned of an engine from the requests it served."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
from attrs import Factory, define, field

KEEP = 0.95
"""Weight that an observation keeps when the next one comes."""
PROMPT_TOKEN, NEXT_TOKEN = 1e-4, 0.02
"""Seconds that are assumed as long as no engine was seen."""
TTFT_LEAST, TPOT_LEAST = 0.25, 0.05
"""See `Line.least`: that the first token takes longer for each prompt token, and the next ones for each request."""
DEFAULTS = ((0.0, PROMPT_TOKEN), (NEXT_TOKEN, TPOT_LEAST * NEXT_TOKEN))
"""Start and slope of both, from these."""
ALIKE = 0.04
"""Part of their mean square that values vary by at least, for a slope to be seen in them."""
PRIOR = 10
"""Observations that count against what an engine seems to differ by from its kind."""
OUTLIER = 4.0
"""An answer counts as at most so many times as slow, or as fast, as was expected."""


@define
class Line:
    """y = start + slope * x by least squares over what was seen lately; neither is below 0.

    The slope is at least `least` times the mean y over the mean x, for where all x were alike, or noise hides it: who
    believes that more work takes no longer sends all of it to one engine.
    """

    least: float
    start: float = 0.0
    slope: float = 0.0
    _seen: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def at(self, x: float) -> float:
        return self.start + self.slope * x

    def add(self, x: float, y: float) -> None:
        """x > 0, y >= 0"""
        self._seen = KEEP * self._seen + 1
        self._x = KEEP * self._x + x
        self._y = KEEP * self._y + y
        self._xx = KEEP * self._xx + x * x
        self._xy = KEEP * self._xy + x * y
        spread = self._xx - self._x * self._x / self._seen
        fitted = (self._xy - self._x * self._y / self._seen) / spread if spread > ALIKE * self._xx else 0.0
        self.slope = max(fitted, self.least * self._y / self._x)
        self.start = (self._y - self.slope * self._x) / self._seen
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
        self._lines: tuple[list[Line], list[Line]] = ([], [])
        self.known = np.zeros((2, 0), np.bool_)
        """Whether the first token, and whether the time between two, was seen."""
        self.guessed = np.zeros(0, np.bool_)
        """Whether one of the two was not."""
        self.unseen = 0
        """How often `known` is not."""
        self.table = np.zeros((4, 1))
        """Seconds to a first token, beside those for each prompt token up to it; seconds to a next token, beside those
        for each request there. One more than there are kinds, as rows without an engine have a kind too."""

    def kind(self, of: Hashable) -> int:
        """Its index."""
        if of not in self._kinds:
            self._kinds[of] = len(self._kinds)
            for lines, least in zip(self._lines, (TTFT_LEAST, TPOT_LEAST)):
                lines.append(Line(least))
            self.known = np.concatenate([self.known, np.zeros((2, 1), np.bool_)], axis=1)
            self.table = np.concatenate([self.table, np.zeros((4, 1))], axis=1)
            self._count()
            for what in range(2):
                self._guess(what)
        return self._kinds[of]

    def first(self, kind: int, tokens: float, seconds: float) -> float:
        """A first token came behind so many prompt tokens. Returns the time over the one predicted."""
        return self._learn(0, kind, tokens, seconds)

    def each(self, kind: int, requests: float, seconds: float) -> float:
        """Tokens came so many seconds apart, among so many requests. Returns the time over the one predicted."""
        return self._learn(1, kind, requests, seconds)

    def _learn(self, what: int, kind: int, x: float, seconds: float) -> float:
        line, ratio = self._lines[what][kind], 1.0
        expected = line.at(x)
        known = self.known.item(what, kind)
        if known and expected > 0:
            ratio = min(OUTLIER, max(1 / OUTLIER, seconds / expected))
            seconds = expected * ratio
        line.add(x, seconds)
        self.table[2 * what, kind], self.table[2 * what + 1, kind] = line.start, line.slope
        if not known:
            self.known[what, kind] = True
            self._count()
        if self.unseen:
            self._guess(what)
        return ratio

    def _count(self) -> None:
        self.unseen = int((~self.known).sum())
        self.guessed = ~self.known.all(axis=0)

    def _guess(self, what: int) -> None:
        """Kinds are few: a loop takes less time than numpy."""
        known, rows = self.known[what].tolist(), self.table[2 * what : 2 * what + 2]
        seen = [line for line, is_known in zip(self._lines[what], known) if is_known]
        start, slope = DEFAULTS[what]
        if seen:
            start, slope = min([line.start for line in seen]), min([line.slope for line in seen])
        for kind, is_known in enumerate(known):
            if not is_known:
                rows[0, kind], rows[1, kind] = start, slope
