"""When to leave an engine alone, when to give it up, and when to stop trying elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from attrs import define, field

from sagellm.engine.stats import EngineLoad

FAILURES = 3
"""In a row, after which an engine is left alone."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds; each further failure doubles the pause."""
RETRIES_AT_ONCE = 10.0
RETRIES_PER_REQUEST = 0.2


@define(eq=False)
class Lost:
    """Whether an engine does not answer any more, and who wants to hear of it."""

    _set: bool = False
    _listeners: set[Callable[[], None]] = field(factory=set)

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        for hears in list(self._listeners):
            hears()

    def clear(self) -> None:
        self._set = False

    def listen(self, hears: Callable[[], None]) -> None:
        """Until `forget`."""
        self._listeners.add(hears)

    def forget(self, hears: Callable[[], None]) -> None:
        self._listeners.discard(hears)


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
class Progress:
    """Whether an engine that has requests gets on with them, by what it counts. Times are of the caller's clock."""

    _counts: tuple[float | None, ...] = ()
    _since: float | None = None
    """When it was first seen with requests and these counts; None: it had none, or moved. Its silence changes nothing,
    nor that requests are taken away from it then."""

    def still(self, load: EngineLoad | None, requests: int, now: float) -> float:
        """Seconds for which it had requests and counted nothing; 0 of an engine that does not tell what it counts.

        `load`: as it says now; None: it did not. `requests`: those that were sent there, where it does not say.
        """
        if load is not None:
            counts = (load.prompt, load.generated, load.reused, load.kv_use)  # a long prompt fills the cache
            if load.generated is None:
                counts = ()
            if load.running is not None:
                requests = load.running + (load.waiting or 0)
            if not requests or counts != self._counts:
                self._since = None
            self._counts = counts
        if self._since is None and requests and self._counts:
            self._since = now
        return 0.0 if self._since is None else now - self._since

    def moved(self) -> None:
        """Tokens of it came."""
        self._since = None


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
