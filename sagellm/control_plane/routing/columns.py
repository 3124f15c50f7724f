"""What is known of each engine, as arrays with a row an engine."""

from __future__ import annotations

import numpy as np

DTYPES = {
    "live": np.bool_, "accepting": np.bool_, "model": np.int64, "kind": np.int64,
    "features": np.int64, "turn": np.int64,
}  # fmt: skip
"""Others are float64, so that no product converts."""


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
