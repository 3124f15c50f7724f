"""What is known of each engine, as arrays with a row an engine."""

from __future__ import annotations

import numpy as np

DTYPES = {
    "live": np.bool_, "accepting": np.bool_, "ttft_known": np.bool_, "tpot_known": np.bool_,
    "model": np.int64, "features": np.int64, "turn": np.int64,
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
    ttft_known: np.ndarray
    ttft_start: np.ndarray
    """Seconds to a first token, beside ..."""
    ttft_token: np.ndarray
    """... those for each prompt token up to it."""
    tpot_known: np.ndarray
    tpot_start: np.ndarray
    """Seconds to a next token, beside ..."""
    tpot_request: np.ndarray
    """... those for each request there."""
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
