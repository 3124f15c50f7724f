"""Requests that wait while every engine that could serve them is full."""

from __future__ import annotations

import asyncio
import heapq
from itertools import count

from sagellm.control_plane.routing.ask import Ask
from sagellm.errors import QueueFull


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
