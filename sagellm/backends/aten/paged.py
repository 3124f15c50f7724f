"""A step's columns for attention kernels that read a paged cache through block tables."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sagellm.backends.aten.columns import AtenRows
from sagellm.rows import Rows


class Sequences:
    """B sequences. Tensors are int32 and on the device, but those that end in `_host`."""

    def __init__(self, queries: np.ndarray, lengths: np.ndarray, blocks: np.ndarray, put):
        """Queries and cached tokens of each, and block numbers [B, blocks of the longest]."""
        self._put = put
        self.most_queries = int(queries.max(initial=0))
        self.most_keys = int(lengths.max(initial=0))
        self.lengths_host = _int32(lengths)
        """[B] cached tokens."""
        self.query_offsets_host = _offsets(queries)
        """[B + 1] first query of each, and all."""
        self.key_offsets_host = _offsets(lengths)
        self._blocks = blocks

    @cached_property
    def lengths(self) -> Tensor:
        return self._put(self.lengths_host.numpy())

    @cached_property
    def query_offsets(self) -> Tensor:
        return self._put(self.query_offsets_host.numpy())

    @cached_property
    def key_offsets(self) -> Tensor:
        return self._put(self.key_offsets_host.numpy())

    @cached_property
    def block_table(self) -> Tensor:
        """[B, blocks of the longest]"""
        return self._put(np.ascontiguousarray(self._blocks, np.int32))


class PagedRows(AtenRows):
    """Rows for stock torch and for kernels that want `Sequences`: those that decode, those with prompts, or all."""

    def __init__(self, rows: Rows, block_size: int, device: str, slots: type = np.int64):
        super().__init__(rows, block_size, device)
        self.slots = self._put(rows.slots.astype(slots))
        self.numbers = torch.arange(len(rows.tokens), device=device)
        """int64 [T] 0, 1, 2 ..."""
        self.sources = self.numbers if self.kv_source is None else self.kv_source
        """int64, of which token the keys and values of each slot are."""

    @cached_property
    def decodes(self) -> Sequences:
        r = self.rows
        return Sequences(np.ones_like(r.decode_lengths), r.decode_lengths, r.decode_blocks, self._put)

    @cached_property
    def prompts(self) -> Sequences:
        r = self.rows
        return Sequences(np.diff(r.prefill_offsets), r.prefill_lengths, r.prefill_blocks, self._put)

    @cached_property
    def sequences(self) -> Sequences:
        """Those that decode, then those with prompts."""
        r = self.rows
        queries = np.concatenate([np.ones_like(r.decode_lengths), np.diff(r.prefill_offsets)])
        lengths = np.concatenate([r.decode_lengths, r.prefill_lengths])
        return Sequences(queries, lengths, stacked(r.decode_blocks, r.prefill_blocks), self._put)


def stacked(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The rows of both, filled up with block 0."""
    width = max(first.shape[1], second.shape[1])
    return np.concatenate([np.pad(t, ((0, 0), (0, width - t.shape[1]))) for t in (first, second)])


def _int32(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int32))


def _offsets(counts: np.ndarray) -> Tensor:
    return _int32(np.concatenate([[0], np.cumsum(counts)]))
