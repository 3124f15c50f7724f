"""Calls that do nothing. Hidden states are whatever came first, logits and tokens have the right shape."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sagellm.rows import Rows
from sagellm.schemas import KVCacheSchema

TOKEN = 5
"""What it says: visible text in the built-in model, so that a server has something to send."""


def call(x: Any, *others: Any) -> Any:
    return x


def same(x: Any, results: int) -> tuple:
    return (x,) * results


def select_outputs(rows: Rows) -> Tensor:
    return logits(len(rows.outputs), 1)


def pool(rows: Rows, hidden: int) -> Tensor:
    return logits(len(rows.prefill_lengths), hidden)


def linear(x: Any, out: int) -> Any:
    return logits(len(x), out) if isinstance(x, Tensor) else x


@lru_cache(4096)
def logits(rows: int, vocabulary: int) -> Tensor:
    """[rows, vocabulary] zeros that take no memory."""
    return torch.zeros(1, 1).expand(rows, vocabulary)


def tokens(logits: Tensor) -> Tensor:
    return chosen(len(logits))


@lru_cache(4096)
def chosen(rows: int) -> Tensor:
    return torch.full((rows,), TOKEN)


class NullCache(list):
    """The KV cache of no layer's memory."""

    beside = None

    def __init__(self, schema: KVCacheSchema):
        super().__init__([(None, None)] * schema.num_layers)
        self._block = (schema.num_layers, 2, schema.block_size, schema.num_kv_heads, schema.head_dim)

    def clear(self, blocks: np.ndarray) -> None: ...

    def read(self, blocks: np.ndarray) -> Tensor:
        return torch.zeros(1).expand(len(blocks), *self._block)

    def write(self, blocks: np.ndarray, values: Tensor) -> None: ...

    def copy(self, blocks: np.ndarray, copies: np.ndarray) -> None: ...

    def move(self, slots: np.ndarray, places: np.ndarray) -> None: ...
