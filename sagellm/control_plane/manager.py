"""`ControlPlaneManager`: where requests go, and how each of them went; its engines are `roster.py`'s matter."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np
from attrs import asdict
from pydantic_core import from_json

from sagellm.control_plane.calls import Call, call_of
from sagellm.control_plane.config import ControlPlaneConfig
from sagellm.control_plane.endpoint import Reply
from sagellm.control_plane.faults import RetryBudget
from sagellm.control_plane.features import ROUTES
from sagellm.control_plane.launch import Launcher
from sagellm.control_plane.members import Member
from sagellm.control_plane.relay import Outcome, Relay
from sagellm.control_plane.remote import as_error
from sagellm.control_plane.roster import Roster
from sagellm.control_plane.routing.decision import Decision, NoEngine, Router
from sagellm.control_plane.routing.fleet import ACCEPTING, NEVER
from sagellm.control_plane.types import RequestMetadata
from sagellm.control_plane.waiting import comeback
from sagellm.errors import UserError

__all__ = ["ControlPlaneConfig", "ControlPlaneManager", "Member"]

KEPT_REQUESTS = 1000


class ControlPlaneManager(Roster):
    """Engines come and go by `register_engine` and `unregister_engine`, at any time and in any state.

    Requests are OpenAI's (`submit`, `call_of`), or `RequestMetadata` as SAGE has them (`submit_request`). All but
    `register_engine` and what only looks is of one event loop, in which `start` begins to probe.
    """

    def __init__(
        self,
        config: ControlPlaneConfig | None = None,
        *,
        launcher: Launcher | None = None,
        clock: Callable[[], float] = time.monotonic,
        **settings: Any,
    ):
        super().__init__(config, launcher=launcher, clock=clock, **settings)
        self.router = Router(
            self.fleet, self.config.strategy, seed=self.config.seed, keep=self.config.decisions
        )
        self.retries = RetryBudget()
        self.requests: dict[str, RequestMetadata] = {}
        """The last ones, by id."""
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """(engine, outcome) -> requests."""
        self._open: dict[str, asyncio.Task] = {}
        self._turned_away = count()
        self._relay = Relay(self)

    # requests, as clients send them

    async def submit(self, call: Call) -> Reply:
        """An OpenAI request's answer, as an engine gave it. Raises NoEngine, QueueFull or EngineLost."""
        self._remember(call.metadata)
        return await self._relay.send(call)

    def _remember(self, metadata: RequestMetadata) -> None:
        self.requests[metadata.request_id] = metadata
        while len(self.requests) > KEPT_REQUESTS:
            del self.requests[next(iter(self.requests))]

    async def submit_request(self, request: RequestMetadata) -> dict[str, Any]:
        """A request as SAGE has it, and its OpenAI answer. Raises UserError for what engines refuse."""
        if request.request_id in self._open:
            raise UserError(f"request id {request.request_id!r} is in use; accepted: a new one")
        task = asyncio.create_task(self._answer(request))
        self._open[request.request_id] = task
        try:
            return await task
        except asyncio.CancelledError:
            if not task.cancelled() or (current := asyncio.current_task()) is None or current.cancelling():
                task.cancel()
                raise
            raise UserError(f"request {request.request_id!r} was cancelled") from None
        finally:
            del self._open[request.request_id]

    async def _answer(self, request: RequestMetadata) -> dict[str, Any]:
        reply = await self.submit(call_of(request))
        body = await reply.read()
        if reply.status != 200:
            raise as_error(reply.status, body)
        return from_json(body)

    async def cancel_request(self, request_id: str) -> bool:
        """End a request of `submit_request`, at its engine too; False where there is none of this id."""
        task = self._open.get(request_id)
        return task is not None and task.cancel()

    def get_request_status(self, request_id: str) -> dict[str, Any]:
        if request_id not in self.requests:
            raise UserError(f"unknown request {request_id!r}; accepted: one of the last {KEPT_REQUESTS}")
        metadata = self.requests[request_id]
        state = "finished" if metadata.end_time else "running" if metadata.start_time else "queued"
        return {"state": state} | metadata.to_dict()

    def get_cluster_status(self) -> dict[str, Any]:
        """Engines by state, with how busy they are."""
        engines = [
            member.info.to_dict() | {"detail": member.detail, "load": asdict(member.load)}
            for member in self.members.values()
        ]
        states = [engine["state"] for engine in engines]
        return {
            "strategy": self.router.strategy.name,
            "engines": engines,
            "states": {state: states.count(state) for state in sorted(set(states))},
            "waiting": len(self.waiting),
            "routes": list(ROUTES),
        }

    # requests on their way, as the relay tells

    async def place(self, call: Call, excluded: Sequence[str] = ()) -> tuple[Member, Decision]:
        """The engine for a request; waits while all that could serve it are full. Raises NoEngine or QueueFull."""
        waited = False
        while True:
            if waited or not self.waiting.ahead(call.ask):
                try:
                    decision = self.router.choose(call.ask, excluded)
                except NoEngine as error:
                    if error.kind != "full":
                        raise
                else:
                    return self.members[decision.chosen], decision
            await self.waiting.wait(call.ask)
            waited = True

    def retry_after(self, call: Call) -> int:
        """Whole seconds, 1 to 60, after which a request that found no room may come again.

        There will be room once those who wait before it have gone, as fast as the engines that could serve it lately
        answered; where none takes requests, when one that failed is tried again, or was probed once more. Those who
        are sent away together are told times that differ.
        """
        now = self.clock()
        reasons = self.fleet.refusals(call.ask).reasons()
        could = ~reasons[NEVER].any(axis=0)
        open_ = self._members_of(could & ~reasons[ACCEPTING])
        if open_:
            rate = sum(member.pace.rate(now) for member in open_)
            seconds = (self.waiting.before(call.ask) + 1) / rate
        else:
            pauses = [p for m in self._members_of(could) if (p := m.breaker.pause(now))]
            seconds = min(pauses, default=self.config.probe_every)
        return comeback(seconds, next(self._turned_away))

    def _members_of(self, rows: np.ndarray) -> list[Member]:
        """`rows`: bool, of the fleet's engines."""
        engines = (self.fleet.engines[row] for row in np.flatnonzero(rows))
        return [self.members[engine.engine_id] for engine in engines if engine is not None]

    def sent(self, member: Member, call: Call) -> None:
        """A request goes to an engine; `ended` follows."""
        info = member.info
        info.active_requests += 1
        member.idle.clear()
        member.pace.begins(self.clock())
        member.breaker.sent()
        if not member.gone:
            self.fleet.sent(info.engine_id, call.ask)
            if member.breaker.trying:
                self.watch.tell(member)

    def first_token(self, member: Member, call: Call, seconds: float) -> None:
        member.progress.moved()
        if not member.gone:
            self.fleet.first_token(member.info.engine_id, call.ask, seconds)

    def ended(self, member: Member, call: Call, outcome: Outcome, made: int, per_token: float | None) -> None:
        info = member.info
        info.active_requests -= 1
        if outcome is Outcome.ANSWERED:
            member.pace.answered(self.clock())
        if made:
            member.progress.moved()
        if not info.active_requests:
            member.pace.rests(self.clock())
            member.idle.set()
        if not member.gone:
            if outcome is Outcome.ANSWERED:
                self.fleet.finished(info.engine_id, call.ask, made, per_token)
            else:
                self.fleet.failed(info.engine_id, call.ask)
        self.outcomes[info.engine_id, outcome.value] += 1
        if outcome is Outcome.FAILED:
            self._failed(member)
        else:
            tried = member.breaker.trying
            member.breaker.succeeded() if outcome is Outcome.ANSWERED else member.breaker.undecided()
            if tried:
                self.watch.tell(member)
        self.waiting.wake(info.model_id)

    def _failed(self, member: Member) -> None:
        """A request failed there; after some in a row it gets none for a while."""
        pause = member.breaker.failed(self.clock())
        if pause is not None:
            self.watch.tell(member)
            asyncio.get_running_loop().call_later(pause, self.watch.tell, member)
