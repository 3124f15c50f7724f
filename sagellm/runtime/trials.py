"""Does a decision that may be left out pay? Now and then a step runs without it, between two that run with it.

Steps that follow each other do nearly the same work, so the one without is compared with the mean of its neighbours.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Hashable

from attrs import define, field

EVERY = 64
"""Steps with the decision between two trials; as many more each time it is found to pay."""
LONGEST = 4096
WINDOW = 8
"""Comparisons that a verdict needs."""
LOSS = 0.01
"""A decision that makes steps slower by this part is switched off."""


@define
class Trial:
    """One decision in one kind of step."""

    off: bool = False
    gains: deque[float] = field(factory=lambda: deque(maxlen=WINDOW))
    """Seconds saved in each comparison."""
    _parts: deque[float] = field(factory=lambda: deque(maxlen=WINDOW))
    _every: int = field(factory=lambda: EVERY)
    _since: int = 0
    _before: float = 0.0
    _without: float = 0.0
    _stage: str = "with"

    @property
    def gain(self) -> float | None:
        """Median seconds a step saved, once there are enough comparisons."""
        return statistics.median(self.gains) if len(self.gains) == WINDOW else None

    def leave_out(self) -> bool:
        """Whether the next step shall run without the decision."""
        if self.off:
            return True
        self._since += 1
        if self._since <= self._every or self._stage != "with":
            return False
        self._since, self._stage = 0, "without"
        return True

    def took(self, seconds: float) -> bool:
        """How long the step took; true where this is what switches the decision off."""
        if self.off:
            return False
        if self._stage == "without":
            self._without, self._stage = seconds, "after"
        elif self._stage == "after":
            self._stage = "with"
            around = (self._before + seconds) / 2
            self.gains.append(self._without - around)
            self._parts.append((self._without - around) / around)
            return self._judge()
        else:
            self._before = seconds
        return False

    def _judge(self) -> bool:
        if len(self._parts) < WINDOW:
            return False
        self._every = min(2 * self._every, LONGEST)
        self.off = statistics.median(self._parts) < -LOSS
        return self.off


class Trials:
    """A trial for each decision in each kind of step."""

    def __init__(self):
        self._trials: dict[Hashable, Trial] = {}

    def of(self, key: Hashable) -> Trial:
        return self._trials.setdefault(key, Trial())

    def gains(self) -> dict[Hashable, float]:
        """Those that are known, by key."""
        return {key: gain for key, trial in self._trials.items() if (gain := trial.gain) is not None}
