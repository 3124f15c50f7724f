"""The front: text on one side, a core that speaks token ids on the other, and a journal of every stream between.

One thread listens to the core. What it says goes to the streams, whose readers may be in any thread or event loop.
If the core is lost it is started again, and each stream goes on from its journal: the core gets the prompt and the
tokens it had already chosen, and as a draw depends on (seed, position, sample) alone, it chooses what it would have.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from itertools import count
from typing import Any

from attrs import define, field

from sagellm.batch import Request
from sagellm.engine.base import GenerateResult, Output, TokenEvent
from sagellm.engine.detokenizer import Detokenizer
from sagellm.engine.events import ERROR, REASONS, StepEvents, Top
from sagellm.engine.link import CoreLost, Link
from sagellm.engine.tokenizer import Tokenizer
from sagellm.errors import QueueFull, UserError

log = logging.getLogger(__name__)


@define(eq=False)
class Journal:
    """All that is known of one request: enough to show its output, and to go on with it in another core."""

    number: int
    request: Request
    result: GenerateResult
    detokenizers: list[Detokenizer | None]
    submitted: float
    resumed: str = ""
    """The text of what the request brings of its output."""
    first: float = 0.0
    running: int = 0
    """Samples that have not ended."""
    refused: UserError | None = None
    events: queue.SimpleQueue = field(factory=queue.SimpleQueue)
    """TokenEvents, then None."""
    done: threading.Event = field(factory=threading.Event)
    wake: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
    """The event loop that reads the events, if one does."""

    def as_request(self) -> Request:
        """The request as a core can go on with it."""
        outputs = self.result.outputs
        ended = tuple(i for i, output in enumerate(outputs) if output.finish_reason is not None)
        r = self.request
        return Request(
            r.id,
            r.prompt,
            r.sampling,
            r.priority,
            r.deadline,
            r.salt,
            [list(o.token_ids) for o in outputs],
            ended,
            r.pooling,
        )


class Front:
    """Streams over one core at a time."""

    def __init__(self, link: Callable[[], Link], max_restarts: int):
        self._make_link = link
        self.link = link()
        self.tokenizer: Tokenizer | None = None
        """None shows no text."""
        self.max_restarts, self.restarts = max_restarts, 0
        self.finished: Counter = Counter()
        """Finish reason, as readers see it -> samples."""
        self.error = ""
        """Why no core can be had any more."""
        self._journals: dict[int, Journal] = {}
        self._calls: dict[int, tuple[tuple, Future]] = {}
        self._numbers, self._tokens = count(), count()
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._fruitless = 0
        """Cores lost since the last token."""
        self._closed = False
        self._thread = threading.Thread(target=self._listen, name="sagellm front", daemon=True)
        self._thread.start()

    @property
    def live(self) -> int:
        """Requests that have not ended."""
        return len(self._journals)

    def wait_until_idle(self, timeout: float) -> bool:
        """Block until all requests have ended, at most so many seconds; whether they have."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._journals, timeout)

    # what callers do

    def open(self, request: Request) -> Journal:
        """Send a request to the core; whether it takes it is known by its first event."""
        how = request.sampling
        journal = Journal(
            next(self._numbers),
            request,
            GenerateResult(
                request.id,
                len(request.prompt),
                [Output() for _ in range(how.n)],
                None if how.prompt_logprobs is None else [None],
            ),
            [self._detokenizer(request) for _ in range(how.n)],
            time.perf_counter(),
            running=how.n,
        )
        _replay(journal)
        with self._lock:
            if self.error or self._closed:
                raise UserError(self.error or "the engine is stopped; accepted: requests before that")
            if any(j.request.id == request.id for j in self._journals.values()):
                raise UserError(f"request id {request.id!r} is in use; accepted: a new one")
            self._journals[journal.number] = journal
            detokenizer = journal.detokenizers[0]
            if detokenizer and detokenizer.stopped is not None:
                self._ended_before(journal, 0, "stop")
            else:
                self.link.send(("submit", journal.number, request, False))
        return journal

    def _detokenizer(self, request: Request) -> Detokenizer | None:
        how = request.sampling
        if self.tokenizer is None:
            return None
        return Detokenizer(self.tokenizer, how.stop, min_tokens=how.min_tokens)

    def abort(self, journal: Journal) -> bool:
        """End a request; its stream ends with `abort`."""
        with self._lock:
            if self._journals.get(journal.number) is not journal:
                return False
            self.link.send(("abort", journal.number, None))
            touched = [journal]
            for sample, output in enumerate(journal.result.outputs):
                if output.finish_reason is None:
                    self._end(journal, sample, "abort")
        _wake(touched)
        return True

    def find(self, request_id: str) -> Journal | None:
        with self._lock:
            return next((j for j in self._journals.values() if j.request.id == request_id), None)

    def call(self, method: str, *arguments: Any) -> Future:
        """Ask the core for something; see `CoreService`. Answers come in the order of all that was sent."""
        future: Future = Future()
        with self._lock:
            if self.error or self._closed:
                raise UserError(self.error or "the engine is stopped")
            token = next(self._tokens)
            message = ("call", token, method, arguments)
            self._calls[token] = message, future
            self.link.send(message)
        return future

    def close(self) -> None:
        """End; streams that are open end with `abort`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._end_all("abort", "")
        self.link.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(10)

    # what the core says

    def _listen(self) -> None:
        while True:
            try:
                messages = self.link.receive()
            except CoreLost as error:
                if self._closed or not self._restart(error):
                    return
                continue
            if not messages:
                return
            touched: dict[int, Journal] = {}
            with self._lock:
                for message in messages:
                    for journal in self._take(message):
                        touched[journal.number] = journal
            _wake(touched.values())

    def _take(self, message: Any) -> Iterable[Journal]:
        match message:
            case ("step", events):
                return self._step(events)
            case ("refused", number, text, full):
                journal = self._journals.get(number)
                if journal is None:
                    return ()
                journal.refused = QueueFull(text) if full else UserError(text)
                for sample in range(len(journal.result.outputs)):
                    self._end(journal, sample, "error", text)
                return (journal,)
            case ("ended", number, sample, reason):
                journal = self._journals.get(number)
                if journal is None or journal.result.outputs[sample].finish_reason is not None:
                    return ()
                self._ended_before(journal, sample, reason)
                return (journal,)
            case ("reply", token, value):
                self._calls.pop(token)[1].set_result(value)
            case ("failed", token, text):
                self._calls.pop(token)[1].set_exception(UserError(text))
        return ()

    def _step(self, events: StepEvents) -> Iterable[Journal]:
        touched: dict[int, Journal] = {}
        for began in events.began:
            journal = self._journals.get(began.number)
            if journal is not None and not journal.result.cache_miss:
                result = journal.result
                result.cached_tokens = min(began.cached, result.prompt_tokens)
                result.cache_miss, result.queued = began.miss, began.queued
        for number, prompt_logprobs in events.prompt_logprobs.items():
            journal = self._journals.get(number)
            if journal is not None:
                _add_prompt_logprobs(journal.result, prompt_logprobs)
        columns = (getattr(events, name).tolist() for name in events.COLUMNS)
        for i, (number, sample, index, token, reason) in enumerate(zip(*columns)):
            journal = self._journals.get(number)
            if journal is None:
                continue
            output = journal.result.outputs[sample]
            if output.finish_reason is None and index == len(output.token_ids):
                self._token(journal, sample, token, REASONS[reason], events.logprobs.get(i))
                touched[number] = journal
        for number, vector in events.vectors.items():
            journal = self._journals.get(number)
            if journal is not None:
                journal.result.embedding = vector
                self._end(journal, 0, "stop")
                touched[number] = journal
        for failed in events.failed:
            journal = self._journals.get(failed.number)
            if journal is not None and journal.result.outputs[failed.sample].finish_reason is None:
                self._end(journal, failed.sample, REASONS[ERROR], failed.message)
                touched[failed.number] = journal
        if len(events) or events.vectors:
            self._fruitless = 0
        return touched.values()

    def _token(
        self, journal: Journal, sample: int, token: int, reason: str | None, logprob: tuple[float, Top] | None
    ) -> None:
        result, output, detokenizer = (
            journal.result,
            journal.result.outputs[sample],
            journal.detokenizers[sample],
        )
        now, index = time.perf_counter(), len(output.token_ids)
        made = index - len(journal.request.brought(sample))
        if sample == 0 and made == 0:
            journal.first, result.ttft = now, now - journal.submitted
        elif sample == 0:
            result.tpot = (now - journal.first) / made
        output.token_ids.append(token)
        if logprob is not None:
            output.logprobs.append(logprob[0])
            output.top_logprobs.append(tuple(map(tuple, logprob[1])))
        text = detokenizer.push(token) if detokenizer else ""
        if detokenizer and detokenizer.stopped is not None and reason is None:
            self.link.send(("abort", journal.number, sample))
            reason = "stop"
        if reason is not None:
            text += detokenizer.finish() if detokenizer else ""
            if detokenizer and detokenizer.stopped is not None:
                reason, output.stopped_by = "stop", detokenizer.stopped
        output.text += text
        output.finish_reason = reason
        logprobs = () if logprob is None else ((output.logprobs[-1], output.top_logprobs[-1]),)
        journal.events.put(TokenEvent(result.request_id, index, (token,), text, logprobs, reason, sample))
        if reason is not None:
            self._ended(journal, reason)

    def _ended_before(self, journal: Journal, sample: int, reason: str) -> None:
        """A sample whose whole output the request brought: its text was told before, to its end."""
        output, detokenizer = journal.result.outputs[sample], journal.detokenizers[sample]
        if detokenizer:
            output.text += detokenizer.finish()
            if detokenizer.stopped is not None:
                reason, output.stopped_by = "stop", detokenizer.stopped
        output.finish_reason = reason
        index = len(output.token_ids)
        journal.events.put(TokenEvent(journal.request.id, index, (), "", (), reason, sample))
        self._ended(journal, reason)

    def _end(self, journal: Journal, sample: int, reason: str, error: str = "") -> None:
        """A sample ends without a token."""
        output = journal.result.outputs[sample]
        detokenizer = journal.detokenizers[sample]
        text = detokenizer.finish() if detokenizer else ""
        output.text += text
        output.finish_reason = reason
        journal.result.error = journal.result.error or error
        event = TokenEvent(journal.request.id, len(output.token_ids), (), text, (), reason, sample)
        journal.events.put(event)
        self._ended(journal, reason)

    def _ended(self, journal: Journal, reason: str) -> None:
        self.finished[reason] += 1
        journal.running -= 1
        if journal.running == 0:
            del self._journals[journal.number]
            journal.events.put(None)
            journal.done.set()
            if not self._journals:
                self._idle.notify_all()

    def _end_all(self, reason: str, error: str) -> None:
        touched = list(self._journals.values())
        for journal in touched:
            for sample, output in enumerate(journal.result.outputs):
                if output.finish_reason is None:
                    self._end(journal, sample, reason, error)
        for _, future in self._calls.values():
            future.set_exception(UserError(error or "the engine is stopped"))
        self._calls.clear()
        _wake(touched)

    # when the core is lost

    def _restart(self, why: CoreLost) -> bool:
        """A new core that goes on with all streams; False where none can be had."""
        log.warning("the core was lost (%s); %d streams go on in a new one", why, len(self._journals))
        self._fruitless += 1
        if self._fruitless > self.max_restarts:
            return self._give_up(f"the core was lost {self._fruitless} times without a token between ({why})")
        try:
            link = self._make_link()
        except (UserError, OSError) as error:
            return self._give_up(f"the core was lost ({why}) and cannot be started again: {error}")
        with self._lock:
            self.link.close()
            self.link = link
            self.restarts += 1
            if self._closed:
                link.close()
                return False
            for journal in self._journals.values():
                link.send(("submit", journal.number, journal.as_request(), True))
            for message, _ in self._calls.values():
                link.send(message)
        return True

    def _give_up(self, error: str) -> bool:
        log.error("%s", error)
        with self._lock:
            self.error = error
            self._end_all("error", error)
        return False


def _replay(journal: Journal) -> None:
    """Be where the output was behind the tokens that the request brings of it, for its text and what is withheld."""
    for output, detokenizer, tokens in zip(
        journal.result.outputs, journal.detokenizers, journal.request.output
    ):
        output.token_ids += tokens
        if detokenizer is None:
            continue
        for i, token in enumerate(tokens):
            detokenizer.push(token)
            if detokenizer.stopped is not None and i + 1 < len(tokens):
                raise UserError(
                    f"resume goes on behind stop string {detokenizer.stopped!r}; accepted: an output up to its end"
                )
        output.text = journal.resumed = detokenizer.text


def _add_prompt_logprobs(result: GenerateResult, some: list[tuple[int, float, Top]]) -> None:
    listed = result.prompt_logprobs
    assert listed is not None
    for position, logprob, top in some:
        if position == len(listed):
            listed.append((logprob, tuple(map(tuple, top))))


def _wake(journals: Iterable[Journal]) -> None:
    """Tell event loops that their streams have news: once a loop, whatever the number of streams."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for journal in journals:
        if journal.wake is not None:
            loop, event = journal.wake
            loops.setdefault(loop, []).append(event)
    for loop, events in loops.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda some=events: [event.set() for event in some])
