"""A request goes to an engine; when that is lost, to another one, and a stream goes on where it was."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json, to_json

from sagellm.control_plane.calls import Call
from sagellm.control_plane.endpoint import Batches, EngineLost, Reply
from sagellm.control_plane.journal import StreamJournal
from sagellm.control_plane.remote import message_of
from sagellm.control_plane.routing.decision import NoEngine
from sagellm.errors import QueueFull
from sagellm.server.errors import body_of

if TYPE_CHECKING:
    from sagellm.control_plane.manager import ControlPlaneManager
    from sagellm.control_plane.members import Member

log = logging.getLogger(__name__)

BUSY = frozenset({429, 503})
"""The engine is well and takes nothing now."""
FAILED = frozenset({500, 502, 504})
PASSED_ON = ("content-type", "retry-after", "cache-control")
"""Headers of an engine's answer that the client sees."""
ENGINE = "x-sagellm-engine"
DONE = b"data: [DONE]\n\n"
END_SECONDS = 1.0
"""That a stream has to end behind its last event."""


class Outcome(Enum):
    """Of a request at one engine."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """It is well and did not take the request, or the client went away."""
    FAILED = "failed"


class Attempt:
    """A request at one engine, from when it is sent until it has ended there, told to the manager once each.

    The engine is given up, from wherever it is waited for, where others find it lost, or a stream stalls.
    """

    def __init__(self, manager: ControlPlaneManager, member: Member, call: Call):
        self._manager, self.member, self._call = manager, member, call
        self._loop = asyncio.get_running_loop()
        self._began = time.perf_counter()
        self._first: float | None = None
        self._asking: asyncio.Timeout | None = None
        self._reply: Reply | None = None
        self._events: Batches | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waits_since: float | None = None
        self._lost: str | None = None
        self._over = False
        manager.sent(member, call)
        member.lost.listen(self._is_lost)
        if member.lost.is_set():
            self._is_lost()

    async def begin(self, path: str, body: dict[str, Any]) -> Reply:
        """The head of the answer. Raises EngineLost."""
        if self._lost is not None:
            raise EngineLost(self._lost)
        try:
            async with asyncio.timeout(None) as self._asking:
                self._reply = await self.member.endpoint.send("POST", path, body, self._call.headers)
        except TimeoutError as error:
            raise EngineLost(self._lost or "no answer in time") from error
        finally:
            self._asking = None
        return self._reply

    async def events(self) -> list[bytes] | None:
        """What a stream says next, see `endpoint.Batches`; None: it has ended. Raises EngineLost."""
        if self._events is None:
            assert self._reply is not None
            self._events = Batches(self._reply)
            self._look_whether_it_stalls()
        self._waits_since = self._loop.time()
        try:
            return await self._events.next()
        except EngineLost as error:
            if self._lost is not None:
                raise EngineLost(self._lost) from error
            raise
        finally:
            self._waits_since = None

    def _look_whether_it_stalls(self) -> None:
        """One timer goes on through a stream, as setting one for each piece costs more than passing it on."""
        seconds = self._manager.config.stall
        waits = 0.0 if self._waits_since is None else self._loop.time() - self._waits_since
        if waits >= seconds:
            self._give_up(f"it said nothing for {seconds:g} s")
        else:
            self._timer = self._loop.call_later(seconds - waits, self._look_whether_it_stalls)

    def _is_lost(self) -> None:
        self._give_up(f"{self.member.info.engine_id} does not answer any more")

    def _give_up(self, why: str) -> None:
        self._lost = why
        if self._asking is not None:
            self._asking.reschedule(self._loop.time())
        elif self._reply is not None:
            _in_background(self._reply.aclose())

    def first_token(self) -> None:
        if self._first is None:
            self._first = time.perf_counter() - self._began
            self._manager.first_token(self.member, self._call, self._first)

    async def end(self, outcome: Outcome, made: int = 0) -> None:
        """It has ended, with so many tokens. Calls behind the first do nothing."""
        if self._over:
            return
        self._over = True
        self.member.lost.forget(self._is_lost)
        if self._timer is not None:
            self._timer.cancel()
        per_token = None
        if self._first is not None and made > 1:
            per_token = (time.perf_counter() - self._began - self._first) / (made - 1)
        self._manager.ended(self.member, self._call, outcome, made, per_token)
        if self._reply is None:
            return
        if outcome is Outcome.ANSWERED:
            _in_background(_let_end(self._reply))
        else:  # a client that went away may have this task cancelled at every await
            await asyncio.shield(_in_background(self._reply.aclose()))


_closing: set[asyncio.Task] = set()


def _in_background(work: Coroutine[Any, Any, None]) -> asyncio.Task:
    task = asyncio.create_task(work)
    _closing.add(task)
    task.add_done_callback(_closing.discard)
    return task


async def _let_end(reply: Reply) -> None:
    """Behind its last event an answer still has an end; once that is read, the connection serves the next request."""
    try:
        with suppress(EngineLost, TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                async for _ in reply.pieces:
                    pass
    finally:
        await reply.aclose()


class Relay:
    def __init__(self, manager: ControlPlaneManager):
        self._manager = manager

    async def send(self, call: Call) -> Reply:
        """The answer. Raises NoEngine, QueueFull or EngineLost where none can be had."""
        self._manager.retries.earn()
        tried: list[str] = []
        if call.streams:
            return await self._stream(call, StreamJournal(call.path, call.body), tried)
        opened = await self._open(call, None, tried)
        return opened if isinstance(opened, Reply) else opened[1]

    async def _open(
        self, call: Call, journal: StreamJournal | None, tried: list[str]
    ) -> tuple[Attempt, Reply] | Reply:
        """A stream that has begun; or a whole answer; or, where all engines refuse, the last refusal."""
        last: Reply | None = None
        lost = False
        for turn in range(self._manager.config.attempts):
            if turn and not self._may_try_again(call, lost):
                break
            try:
                member = await self._place(call, journal, tried)
            except (NoEngine, QueueFull):
                if last is not None:
                    return last
                raise
            attempt = Attempt(self._manager, member, call)
            outcome, made, lost, begun = Outcome.REFUSED, 0, False, False
            try:
                path, body = (
                    (call.path, call.body)
                    if journal is None
                    else journal.request(member.features, member.longest)
                )
                if not body.get("model"):
                    body = body | {"model": member.info.model_id}
                reply = await attempt.begin(path, body)
                if reply.status == 200 and journal is not None:
                    begun = True
                    return attempt, reply
                said = b"".join([piece async for piece in reply.pieces])
                if reply.status not in BUSY | FAILED:
                    outcome, made = Outcome.ANSWERED, _made(said)
                    self._note_end(call, made)
                    return _answer(member, reply, said)
                outcome = Outcome.FAILED if reply.status in FAILED else Outcome.REFUSED
                last = _answer(member, reply, said)
            except EngineLost as error:
                outcome, lost = Outcome.FAILED, True
                log.warning("%s: %s was lost: %s", call.metadata.request_id, member.info.engine_id, error)
            finally:
                if not begun:
                    await attempt.end(outcome, made)
            tried.append(member.info.engine_id)
        if last is None:
            raise EngineLost(f"engines were lost while they had the request: {', '.join(tried)}")
        return last

    def _may_try_again(self, call: Call, lost: bool) -> bool:
        """A request whose engine was lost may once go elsewhere, however many there are; all else is budgeted."""
        call.retries += 1
        return (lost and call.retries == 1) or self._manager.retries.take()

    async def _place(self, call: Call, journal: StreamJournal | None, tried: list[str]) -> Member:
        unfit = []
        if journal is not None and journal.began:
            members = self._manager.members.values()
            unfit = [m.info.engine_id for m in members if not journal.can_go_on(m.features)]
        member, _ = await self._manager.place(call, [*tried, *unfit])
        meta = call.metadata
        meta.schedule_time = time.time()
        meta.queue_time = meta.schedule_time - meta.arrival_time
        return member

    async def _stream(self, call: Call, journal: StreamJournal, tried: list[str]) -> Reply:
        """What fails before an engine has begun to answer is an answer of its own, with its own status."""
        opened = await self._open(call, journal, tried)
        if isinstance(opened, Reply):
            return opened
        engines: list[str] = []
        pieces = self._pieces(call, journal, opened, tried, engines)
        said = _Begun(await anext(pieces), pieces)
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache", ENGINE: engines[-1]}
        return Reply(200, headers, said, pieces.aclose)

    async def _pieces(
        self,
        call: Call,
        journal: StreamJournal,
        opened: tuple[Attempt, Reply] | None,
        tried: list[str],
        engines: list[str],
    ) -> AsyncIterator[bytes]:
        """`engines` get the id of each one as it begins. Raises EngineLost while nothing was said."""
        while opened is not None:
            attempt, _ = opened
            engines.append(attempt.member.info.engine_id)
            outcome = Outcome.REFUSED
            before = journal.tokens
            try:
                while (said := await attempt.events()) is not None:
                    told, error = journal.take(said)
                    if journal.began:
                        self._note_start(call)
                        attempt.first_token()
                    if told:
                        yield told
                    if error is not None:
                        raise error
                outcome = Outcome.ANSWERED
            except EngineLost as error:
                outcome = Outcome.FAILED
                engine = attempt.member.info.engine_id
                log.warning("%s: %s was lost: %s", call.metadata.request_id, engine, error)
            finally:
                await attempt.end(outcome, journal.tokens - before)
                self._note_end(call, journal.tokens)
            if outcome is Outcome.ANSWERED or journal.finish_reason is not None:
                for piece in journal.rest():
                    yield b"data: " + piece + b"\n\n"
                yield DONE
                return
            tried.append(attempt.member.info.engine_id)
            opened = await self._other(call, journal, tried)
        if not journal.began:
            raise EngineLost(f"engines were lost while they had the request: {', '.join(tried)}")
        error = body_of(503, "the engine was lost and no other can go on with the stream", code="engine_lost")
        yield b"data: " + to_json(error) + b"\n\n"

    async def _other(
        self, call: Call, journal: StreamJournal, tried: list[str]
    ) -> tuple[Attempt, Reply] | None:
        """Another engine that goes on with the stream; None where there is none."""
        if not call.metadata.can_be_preempted or not self._may_try_again(call, lost=True):
            return None
        opened = None
        with suppress(NoEngine, QueueFull, EngineLost):
            opened = await self._open(call, journal, tried)
        if isinstance(opened, Reply):
            log.warning("no engine goes on: %s", message_of(opened.status, await opened.read()))
            return None
        return opened

    def _note_start(self, call: Call) -> None:
        meta = call.metadata
        if meta.start_time is None:
            meta.start_time, meta.prefill_completed = time.time(), True

    def _note_end(self, call: Call, made: int) -> None:
        self._note_start(call)
        meta = call.metadata
        meta.tokens_generated, meta.end_time = made, time.time()
        meta.last_token_time = meta.end_time


class _Begun(AsyncIterator[bytes]):
    """A stream of which the first piece was read."""

    def __init__(self, first: bytes, rest: AsyncIterator[bytes]):
        self._first: bytes | None = first
        self._rest = rest

    def __anext__(self) -> Awaitable[bytes]:
        return self._rest.__anext__() if self._first is None else self._take()

    async def _take(self) -> bytes:
        assert self._first is not None
        first, self._first = self._first, None
        return first


def _made(body: bytes) -> int:
    with suppress(ValueError, AttributeError, TypeError, KeyError):
        return int(from_json(body)["usage"].get("completion_tokens", 0))
    return 0


def _answer(member: Member, reply: Reply, body: bytes) -> Reply:
    async def pieces() -> AsyncIterator[bytes]:
        yield body

    async def close() -> None:
        return None

    headers = {name: reply.headers[name] for name in PASSED_ON if name in reply.headers}
    return Reply(reply.status, headers | {ENGINE: member.info.engine_id}, pieces(), close)
