"""Does a decision that may be left out pay? Now and then a step runs without it, between two that run with it.

Steps that follow each other do nearly the same work, so the one without is compared with the mean of its neighbours.
Where they give now one token and now several, it is compared with all of them since the last one without, by the token.
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
AGAIN = 16384
"""Steps without it, after which a decision that was switched off is measured anew."""


@define
class Trial:
    """One decision in one kind of step."""

    uneven: bool = False
    """Whether steps with it differ in the tokens that they give."""
    off: bool = False
    gains: deque[float] = field(factory=lambda: deque(maxlen=WINDOW))
    """Seconds saved in each comparison, by a step or by a token of each sequence."""
    _parts: deque[float] = field(factory=lambda: deque(maxlen=WINDOW))
    _every: int = field(factory=lambda: EVERY)
    _since: int = 0
    _among: tuple[float, float] = (0.0, 0.0)
    """Seconds and tokens of the steps that the one without is compared with."""
    _without: float = 0.0
    _stage: str = "with"

    @property
    def gain(self) -> float | None:
        """Median seconds saved, once there are enough comparisons."""
        return statistics.median(self.gains) if len(self.gains) == WINDOW else None

    def leave_out(self) -> bool:
        """Whether the next step shall run without the decision."""
        self._since += 1
        if self.off:
            if self._since <= AGAIN:
                return True
            self.off, self._since, self._every = False, 0, EVERY
            self.gains.clear()
            self._parts.clear()
        if self._since <= self._every or self._stage != "with":
            return False
        self._since, self._stage = 0, "without"
        return True

    def took(self, seconds: float, tokens: float = 1.0) -> bool:
        """How long the step took, and how many tokens a sequence got; true where this is what switches the decision
        off."""
        if self.off:
            return False
        if self._stage == "without":
            self._without, self._stage = seconds / tokens, "after"
            return False
        after = self._stage == "after"
        before = self._among if self.uneven or after else (0.0, 0.0)
        self._among = before[0] + seconds, before[1] + tokens
        if not after:
            return False
        around = self._among[0] / self._among[1]
        self._among, self._stage = (0.0, 0.0), "with"
        self.gains.append(self._without - around)
        self._parts.append((self._without - around) / around)
        return self._judge()

    def _judge(self) -> bool:
        if len(self._parts) < WINDOW:
            return False
        self._every = min(2 * self._every, LONGEST)
        self.off = statistics.median(self._parts) < -LOSS
        if self.off:
            self._since = 0
        return self.off


class Trials:
    """A trial for each decision in each kind of step."""

    def __init__(self):
        self._trials: dict[Hashable, Trial] = {}

    def of(self, key: Hashable, uneven: bool = False) -> Trial:
        return self._trials.setdefault(key, Trial(uneven))

    def gains(self) -> dict[Hashable, float]:
        """Those that are known, by key."""
        return {key: gain for key, trial in self._trials.items() if (gain := trial.gain) is not None}
