"""When to leave an engine alone, and when to stop trying elsewhere."""

from __future__ import annotations

from attrs import define

FAILURES = 3
"""In a row, after which an engine is left alone."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds; each further failure doubles the pause."""
RETRIES_AT_ONCE = 10.0
RETRIES_PER_REQUEST = 0.2


@define
class Breaker:
    """Closed while requests succeed; open after some failures in a row; after a pause one request may try."""

    failures: int = 0
    closed_at: float = 0.0
    """When the pause ends, on the clock of the caller."""
    trying: bool = False

    def allows(self, now: float) -> bool:
        return self.failures < FAILURES or (now >= self.closed_at and not self.trying)

    def pause(self, now: float) -> float:
        """Seconds for which it is open yet."""
        return max(0.0, self.closed_at - now) if self.failures >= FAILURES else 0.0

    def sent(self) -> None:
        """The one that tries, where it is open."""
        self.trying = self.failures >= FAILURES

    def succeeded(self) -> None:
        self.failures, self.trying = 0, False

    def undecided(self) -> None:
        """The one that tried was not taken, or its client went away: another may try."""
        self.trying = False

    def failed(self, now: float) -> float | None:
        """Seconds for which it is open now; None: it is not."""
        self.failures, self.trying = self.failures + 1, False
        if self.failures < FAILURES:
            return None
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (self.failures - FAILURES))
        self.closed_at = now + pause
        return pause


@define
class RetryBudget:
    """Requests earn a part of a retry each, so that retries stay few beside requests, whatever fails."""

    saved: float = RETRIES_AT_ONCE

    def earn(self) -> None:
        self.saved = min(RETRIES_AT_ONCE, self.saved + RETRIES_PER_REQUEST)

    def take(self) -> bool:
        """Whether one more may be made."""
        if self.saved < 1:
            return False
        self.saved -= 1
        return True
