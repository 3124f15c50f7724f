"""Requests that wait while every engine that could serve them is full, and when those that may not come again."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import deque
from itertools import count

from sagellm.control_plane.routing.ask import Ask
from sagellm.errors import QueueFull

LATEST = 60
"""Seconds after which whoever is sent away comes again, at most."""
SPREAD = 4
"""Over so much of them, one part of so many, those come again who were sent away together."""
PACE = 32
"""Answers that an engine's pace is told from."""


class WaitingRoom:
    """A queue a model: by priority, then by deadline, then by arrival."""

    def __init__(self, most: int, seconds: float):
        """`most` wait at once, each for so many seconds."""
        self._most, self._seconds = most, seconds
        self._queues: dict[str | None, list[tuple]] = {}
        self._numbers = count()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def ahead(self, ask: Ask) -> bool:
        """Whether somebody waits who goes before a request that comes now."""
        queue = self._queues.get(ask.model)
        return bool(queue) and queue[0][:2] <= (ask.priority, ask.deadline_ms or float("inf"))

    def before(self, ask: Ask) -> int:
        """How many wait that go before a request that comes now."""
        mine = (ask.priority, ask.deadline_ms or float("inf"))
        return sum(entry[:2] <= mine for entry in self._queues.get(ask.model, ()))

    async def wait(self, ask: Ask) -> None:
        """Until it is worth another try. Raises QueueFull where too many wait, or it took too long."""
        if self._size >= self._most:
            raise QueueFull(f"all engines are full and {self._size} requests wait; accepted: later")
        turn = asyncio.get_running_loop().create_future()
        queue = self._queues.setdefault(ask.model, [])
        heapq.heappush(queue, (ask.priority, ask.deadline_ms or float("inf"), next(self._numbers), turn))
        self._size += 1
        try:
            await asyncio.wait_for(turn, self._seconds)
        except TimeoutError:
            raise QueueFull(f"all engines were full for {self._seconds:g} s; accepted: later") from None
        finally:
            self._size -= 1
            if turn.cancelled() or not turn.done():
                queue[:] = [entry for entry in queue if entry[3] is not turn]
                heapq.heapify(queue)

    def wake(self, model: str | None) -> None:
        """There is room again: the first in the line tries, among those who said no model too."""
        for name in {model, None}:
            queue = self._queues.get(name)
            while queue:
                turn = heapq.heappop(queue)[3]
                if not turn.done():
                    turn.set_result(None)
                    break


class Pace:
    """How fast an engine lately answered while it had requests. Times are seconds of the caller's clock."""

    def __init__(self) -> None:
        self._busy = 0.0
        """Seconds for which it had any, up to when it had none."""
        self._since: float | None = None
        """When it got the first of those that it has."""
        self._answers = deque([0.0], maxlen=PACE + 1)
        """When they came, in seconds for which it had any."""

    def begins(self, now: float) -> None:
        """It has requests."""
        if self._since is None:
            self._since = now

    def answered(self, now: float) -> None:
        self._answers.append(self._worked(now))

    def rests(self, now: float) -> None:
        """It has none."""
        self._busy, self._since = self._worked(now), None

    def _worked(self, now: float) -> float:
        return self._busy if self._since is None else self._busy + now - self._since

    def rate(self, now: float) -> float:
        """Answers a second. Before the first, it is taken to come now; inf where there never was a request."""
        seconds = self._worked(now) - self._answers[0]
        return max(1, len(self._answers) - 1) / seconds if seconds > 0 else math.inf


def comeback(seconds: float, number: int) -> int:
    """Whole seconds for a `Retry-After`, where there will be room in so many; `number` counts who is sent away."""
    least = math.ceil(min(max(1.0, seconds), LATEST / (1 + 1 / SPREAD)))
    return least + number % (max(1, least // SPREAD) + 1)
