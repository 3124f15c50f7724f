"""What is known of each engine, as arrays with a row an engine."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sagellm.control_plane.routing.learned import Speeds

DTYPES = {
    "live": np.bool_, "accepting": np.bool_, "model": np.int64, "kind": np.int64,
    "features": np.int64, "turn": np.int64,
}  # fmt: skip
"""Others are float64, so that no product converts."""
TOKENS_PER_REQUEST = 2048
"""Prompt tokens still to be computed that count as one request more."""
ONE, PER_TOKEN = np.array(1.0), np.array(1 / TOKENS_PER_REQUEST)
"""Arrays without dimensions, as in all products here: numpy takes twice as long with Python's floats, and with its
integers four times."""


class Columns:
    """Arrays [rows]; a row without an engine is not `live`, and all zeros."""

    live: np.ndarray
    accepting: np.ndarray
    model: np.ndarray
    """A number of its name."""
    features: np.ndarray
    """A bit each."""
    max_length: np.ndarray
    """inf, as in the next, where there is no limit."""
    max_concurrent: np.ndarray
    ranks: np.ndarray
    hardware: np.ndarray
    """See `hardware_class`."""
    cost: np.ndarray
    """Of a token; 0 where it has no price."""
    active: np.ndarray
    """Requests sent there and not ended."""
    ahead: np.ndarray
    """Their prompt tokens that are still to be computed."""
    others: np.ndarray
    """Requests that it has from elsewhere. Like the next three, of its last report, and 0 where it does not tell."""
    queue: np.ndarray
    """Requests that wait there, for each that runs."""
    kv_use: np.ndarray
    crowded: np.ndarray
    """From 0 to 1, how far the KV cache is beyond KV_FULL."""
    kind: np.ndarray
    """Index into `Speeds`."""
    ttft_factor: np.ndarray
    """How much slower it is than its kind, to a first token ..."""
    tpot_factor: np.ndarray
    """... and to each next one."""
    turn: np.ndarray
    """Number of the decision that chose it last."""

    def __init__(self, rows: int = 8):
        for name in self.__annotations__:
            setattr(self, name, np.zeros(rows, DTYPES.get(name, np.float64)))

    def __len__(self) -> int:
        return len(self.live)

    def clear(self, row: int) -> None:
        for name in self.__annotations__:
            getattr(self, name)[row] = 0

    def double(self) -> None:
        for name in self.__annotations__:
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros_like(column)]))


class Outlook(NamedTuple):
    """What all requests alike see of the engines, until something happens. Arrays [rows]; nobody writes them, as
    decisions keep them."""

    free: np.ndarray
    """bool: it has fewer requests than its most."""
    load: np.ndarray
    """Requests; a full KV cache, or prompts still to be computed, count as some more."""
    start: np.ndarray
    """Seconds to a first token, beside `token` for each prompt token."""
    token: np.ndarray
    tpot: np.ndarray
    """Seconds for each next token, with one request more there than now."""
    queued: np.ndarray
    """Seconds for the prompts that are still to be computed."""
    guessed: np.ndarray | None
    """bool: nothing was seen of its kind, so it is taken to be as fast as the fastest. None: there is no such kind."""
    active: np.ndarray
    """Like the next four, as in `Columns`."""
    queue: np.ndarray
    crowded: np.ndarray
    hardware: np.ndarray
    cost: np.ndarray


def outlook(c: Columns, speeds: Speeds) -> Outlook:
    requests = c.active + c.others
    start, token, after, beside = speeds.table.take(c.kind, axis=1)
    start *= c.ttft_factor
    token *= c.ttft_factor
    return Outlook(
        free=c.active < c.max_concurrent,
        load=requests + c.kv_use + c.ahead * PER_TOKEN,
        start=start,
        token=token,
        tpot=(after + beside * (requests + ONE)) * c.tpot_factor,
        queued=c.ahead * token,
        guessed=speeds.guessed.take(c.kind) if speeds.unseen else None,
        active=c.active.copy(),
        queue=c.queue.copy(),
        crowded=c.crowded.copy(),
        hardware=c.hardware.copy(),
        cost=c.cost.copy(),
    )
