"""What is learned of an engine from the requests it served."""

from __future__ import annotations

from attrs import define

KEEP = 0.95
"""Weight that an observation keeps when the next one comes."""


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
    """Of what was seen lately."""

    value: float = 0.0
    seen: float = 0.0

    def add(self, value: float) -> None:
        total = KEEP * self.seen * self.value + value
        self.seen = KEEP * self.seen + 1
        self.value = total / self.seen
