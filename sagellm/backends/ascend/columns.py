"""A step's columns as Ascend's kernels read them: tensors on the device, and sequence lengths as host integers."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sagellm.backends.aten.columns import AtenRows
from sagellm.backends.aten.paged import stacked
from sagellm.rows import Rows


class AscendRows:
    """B sequences: those that decode, then those with prompts; T tokens. Each column goes to the device on first use.

    Lengths of the queries are cumulative and those of the cached keys are not, as the paged attention wants them.
    """

    tokens: Tensor
    positions: Tensor
    lengths: Tensor
    outputs: Tensor
    numbers: Tensor
    """int64 [T] 0, 1, 2 ..."""
    kv_source: Tensor
    slots: Tensor
    """int32 [T + E]"""
    block_table: Tensor
    """int32 [B, blocks of the longest]"""

    def __init__(self, rows: Rows, block_size: int, device: str, causal_mask: Tensor):
        self.rows, self._device = rows, device
        self.block_size, self.causal_mask = block_size, causal_mask
        decodes = len(rows.decode_lengths)
        ends = np.concatenate([np.arange(1, decodes + 1), rows.prefill_offsets[1:]])
        self.query_ends: list[int] = ends.tolist()
        self.kv_lengths: list[int] = np.concatenate([rows.decode_lengths, rows.prefill_lengths]).tolist()

    def __getattr__(self, name: str) -> Tensor:
        if name not in AscendRows.__annotations__:
            raise AttributeError(name)
        value = self._put(column(self.rows, name))
        setattr(self, name, value)
        return value

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)

    @cached_property
    def aten(self) -> AtenRows:
        """The columns as kernels in stock torch read them."""
        return AtenRows(self.rows, self.block_size, self._device)

    @cached_property
    def cohorts(self) -> Cohorts:
        return Cohorts(self.rows, self.block_size, self._put)

    def fill(self, rows: Rows) -> None:
        """Other rows of the same shapes, in the memory that the columns lie in."""
        for name in AscendRows.__annotations__:
            if name in vars(self):
                vars(self)[name].copy_(torch.from_numpy(column(rows, name)), non_blocking=True)
        self.rows, self.kv_lengths = rows, rows.decode_lengths.tolist()


def column(rows: Rows, name: str) -> np.ndarray:
    match name:
        case "slots":
            return rows.slots.astype(np.int32)
        case "numbers":
            return np.arange(len(rows.tokens))
        case "kv_source":
            return np.arange(len(rows.tokens)) if rows.kv_source is None else rows.kv_source
        case "block_table":
            return stacked(rows.decode_blocks, rows.prefill_blocks).astype(np.int32)
    return getattr(rows, name)


class Cohorts:
    """Decode rows that read a common beginning together; M of them in C cohorts. See `Rows`."""

    def __init__(self, rows: Rows, block_size: int, put):
        starts = np.zeros(len(rows.decode_lengths), np.int64)
        sizes = np.diff(rows.cohort_offsets)
        starts[rows.cohort_rows] = np.repeat(rows.cohort_common, sizes)
        own = rows.decode_lengths - starts
        self.own_lengths = own.tolist()
        """Cached tokens of each decode row behind what its cohort shares."""
        width = -(-int(own.max()) // block_size)
        at = starts[:, None] // block_size + np.arange(width)
        last = rows.decode_blocks.shape[1] - 1
        table = np.take_along_axis(rows.decode_blocks, np.minimum(at, last), 1)
        self.own_table = put(np.where(at > last, 0, table).astype(np.int32))
        self.members = put(rows.cohort_rows)
        """int64 [M] cohort after cohort."""
        self.ends = rows.cohort_offsets[1:].tolist()
        self.common = rows.cohort_common.tolist()
        """Tokens that each cohort shares."""
        blocks = -(-int(rows.cohort_common.max()) // block_size)
        leaders = rows.cohort_rows[rows.cohort_offsets[:-1]]
        self.table = put(rows.decode_blocks[leaders, :blocks].astype(np.int32))
