"""Is work on different streams ordered where it touches the same memory? Vector clocks over what a device was asked.

Everything on the fake device is done when it is asked for, so a wait that is missing changes no number; on the chip it
would. Each stream, and the host, has a clock: how much of every stream's work is known to be done before what
comes next on it. Events carry clocks. Two accesses to the same bytes, one of them a write, must be ordered by them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from attrs import define, field, frozen
from torch import Tensor

HOST = 0
"""The number of the host among streams. A queued piece of work comes after all that the host knows to be done."""

Span = tuple[int, int]
"""Addresses, first and behind the last."""


@frozen
class Access:
    """Bytes that some work reads or writes."""

    what: str
    spans: tuple[Span, ...]
    write: bool
    at: int
    """The stream's clock then."""

    def meets(self, spans: Sequence[Span]) -> bool:
        return any(low < end and first < high for low, high in self.spans for first, end in spans)


@define
class Order:
    """What is known of streams, events and memory so far."""

    wrong: list[str] = field(factory=list)
    """Pairs of accesses that nothing orders."""
    accesses: int = 0
    across: int = 0
    """Pairs of accesses to the same bytes on two streams that events or the host order."""
    _clocks: defaultdict[int, dict[int, int]] = field(factory=lambda: defaultdict(dict))
    _events: dict[int, dict[int, int]] = field(factory=dict)
    _open: defaultdict[int, list[Access]] = field(factory=lambda: defaultdict(list))
    """Accesses of each stream that the host does not know to be done."""

    @property
    def streams(self) -> int:
        return len(self._clocks) - (HOST in self._clocks)

    def note(self, line: str) -> None:
        """One line of the fake CANN: what was asked, of which stream, and about which event or memory."""
        what, *numbers = line.split()
        match what, [int(number) for number in numbers]:
            case "record", [stream, event]:
                self._queue(stream)
                self._events[event] = dict(self._clocks[stream])
            case "wait", [stream, event]:
                _learn(self._clocks[stream], self._events.get(event, {}))
            case "event", [event]:
                self._host_learns(self._events.get(event, {}))
            case "stream", [stream]:
                self._host_learns(self._clocks[stream])
            case "device", []:
                for clock in [*self._clocks.values()]:
                    self._host_learns(clock)
            case "copy", [stream, source, to, size]:
                self.access(stream, "a copy", [(source, source + size)], [(to, to + size)])
            case "collective", [stream, source, to, sent, received]:
                self.access(stream, "a collective", [(source, source + sent)], [(to, to + received)])

    def access(self, stream: int, what: str, reads: Sequence[Span], writes: Sequence[Span]) -> None:
        """Work on a stream, or of the host, that touches this memory."""
        self.accesses += 1
        clock = self._queue(stream)
        for other, past in self._open.items():
            if other == stream:
                continue
            known = clock.get(other, 0)
            for access in past:
                if access.meets(writes) or (access.write and access.meets(reads)):
                    self.across += 1
                    if access.at > known:
                        self._unordered(access, what)
        if stream != HOST:
            for spans, write in ((reads, False), (writes, True)):
                if spans:
                    self._open[stream].append(Access(what, tuple(spans), write, clock[stream]))

    def _queue(self, stream: int) -> dict[int, int]:
        """The stream's clock, with one more piece of work on it."""
        clock = self._clocks[stream]
        if stream != HOST:
            _learn(clock, self._clocks[HOST])
            clock[stream] = clock.get(stream, 0) + 1
        return clock

    def _host_learns(self, clock: dict[int, int]) -> None:
        known = self._clocks[HOST]
        _learn(known, clock)
        for stream, past in self._open.items():
            if past and past[0].at <= known.get(stream, 0):
                self._open[stream] = [access for access in past if access.at > known.get(stream, 0)]

    def _unordered(self, access: Access, what: str) -> None:
        said = f"nothing orders {access.what}, which {'writes' if access.write else 'reads'}, and {what}"
        if said not in self.wrong:
            self.wrong.append(said)


def _learn(clock: dict[int, int], other: dict[int, int]) -> None:
    for stream, at in other.items():
        if at > clock.get(stream, 0):
            clock[stream] = at


def spans(x: Tensor, dim: int | None = None, rows: Iterable[int] = ()) -> list[Span]:
    """Where a tensor lies, or where these rows of its dimension `dim` do; gaps inside are counted as its."""
    if x.numel() == 0:
        return []
    size, start = x.element_size(), x.data_ptr()
    if dim is None:
        return [(start, start + size * (1 + _reach(x, 0)))]
    outer = np.zeros(1, np.int64)
    for length, stride in zip(x.shape[:dim], x.stride()[:dim]):
        outer = (outer[:, None] + np.arange(length) * stride).reshape(-1)
    chosen = np.unique(np.fromiter(rows, np.int64)) % x.shape[dim] * x.stride(dim)
    first = start + size * (outer[:, None] + chosen).reshape(-1)
    return [(low, low + size * (1 + _reach(x, dim + 1))) for low in first.tolist()]


def _reach(x: Tensor, dim: int) -> int:
    """From the first value to the last one, over dimensions from `dim` on."""
    return sum((length - 1) * stride for length, stride in zip(x.shape[dim:], x.stride()[dim:]))
