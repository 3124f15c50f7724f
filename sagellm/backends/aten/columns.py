"""A step's columns as kernels read them, on the device. On the CPU, tensors share memory with the numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from sagellm.rows import Rows

NOWHERE = torch.zeros(1, 1, dtype=torch.int64)


@frozen
class Parts:
    """What attention of the decode rows is cut into. M members, N parts."""

    members: Tensor
    """[M] decode rows: of the first part, of the second ..."""
    table: Tensor
    """[N, 6] first member, members, row of the block table, positions from, to; of a tree its context, else -1."""
    blocks: Tensor
    """[rows, blocks of the longest] block table."""
    paths: Tensor = NOWHERE
    """[M, longest] of a tree's node, how many keys it sees, and where those behind the context lie."""
    other: Tensor | None = None
    """[D] for the row's own part, which is the member of its number, the member it is joined with, or -1."""


class AtenRows:
    def __init__(self, rows: Rows, block_size: int, device: str = "cpu"):
        self._put = put = torch.from_numpy if device == "cpu" else _putter(device)
        self.device = device
        self.tokens = put(rows.tokens)
        self.positions = put(rows.positions)
        self.lengths = put(rows.lengths)
        self.slots = put(rows.slots)
        self.kv_source = None if rows.kv_source is None else put(rows.kv_source)
        self.outputs = put(rows.outputs)
        self.decode_count = len(rows.decode_lengths)
        self.decode_blocks = put(np.ascontiguousarray(rows.decode_blocks))
        self.rows, self.block_size = rows, block_size
        self.longest = int(rows.decode_lengths.max()) if self.decode_count else 0
        self._made: dict = {}
        if rows.trees is not None:
            self.tree_nodes = put(rows.trees.nodes)
            self.tree_blocks = put(rows.prefill_blocks.reshape(-1))
            self._within = np.arange(rows.trees.nodes.shape[1]) < rows.trees.counts[:, None]
            self.tree_places = put(np.flatnonzero(self._within))

    @cached_property
    def prefills(self) -> list[tuple[int, int, int, Tensor, bool]]:
        """(first token, end, cached tokens, blocks, whether none were cached before) of each prompt."""
        rows, found = self.rows, []
        offsets = rows.prefill_offsets.tolist()
        for i, length in enumerate(rows.prefill_lengths.tolist()):
            first, end = offsets[i], offsets[i + 1]
            blocks = self._put(rows.prefill_blocks[i, : -(-length // self.block_size)])
            found.append((first, end, length, blocks, end - first == length))
        return found

    def _once(self, key, make):
        """What several layers want is made once a step."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @cached_property
    def decode_lengths(self) -> Tensor:
        """[D] cached tokens."""
        return self._put(self.rows.decode_lengths)

    def decode_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[D, 1, 1, width]: 0 where a cached token is visible, -inf where not."""
        return self._once(("mask", window), lambda: self._decode_mask(window, dtype))

    def _decode_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        at = torch.arange(self.decode_blocks.shape[1] * self.block_size, device=self.device)
        lengths = self.decode_lengths.view(-1, 1)
        hidden = at >= lengths
        if window is not None:
            hidden |= at < lengths - window
        return _hiding(hidden, dtype)

    def tree_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[P, 1, W, width]: 0 where a node sees a cached token or a node of its tree, else -inf."""
        return self._once(("tree", window), lambda: self._tree_mask(window, dtype))

    def _tree_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        trees, rows = self.rows.trees, self.rows
        count, widest = trees.nodes.shape
        width = rows.prefill_blocks.shape[1] * self.block_size
        context = (rows.prefill_lengths - trees.counts)[:, None]
        key_at = np.repeat(np.arange(width + widest)[None], count, 0)
        visible = np.repeat((key_at < context)[:, None], widest, 1)
        cells = context + np.arange(widest)
        at = rows.positions[trees.nodes]
        np.put_along_axis(visible, np.repeat(cells[:, None], widest, 1), trees.sees, 2)
        np.put_along_axis(key_at, cells, at, 1)
        if window is not None:
            visible &= key_at[:, None] > at[:, :, None] - window
        hidden = self._put(~visible[:, None, :, :width])
        return torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, float("-inf"))

    def parts(self, window: int | None) -> Parts:
        """A part for each decode row."""
        return self._once(("parts", window), lambda: self._parts(window))

    def _parts(self, window: int | None) -> Parts:
        count, lengths = self.decode_count, self.rows.decode_lengths
        own = np.arange(count)
        table = _table(own, np.ones(count), own, _starts(lengths, window), lengths)
        return Parts(torch.arange(count), table, self.decode_blocks)

    def tree_parts(self, window: int | None) -> Parts:
        """A part for each decode row without guesses, and one for each tree; behind a window, for each of its nodes, as
        they see different parts of the context."""
        return self._once(("tree parts", window), lambda: self._tree_parts(window))

    def _tree_parts(self, window: int | None) -> Parts:
        r, trees, alone = self.rows, self.rows.trees, self.decode_count
        lengths = np.concatenate([r.decode_lengths, r.positions[alone:] + 1])
        contexts = r.prefill_lengths - trees.counts
        sees, of_node = trees.sees[self._within], np.repeat(np.arange(len(contexts)), trees.counts)
        node, cell = np.nonzero(sees)
        paths = np.zeros((len(lengths), 1 + sees.shape[1]), np.int64)
        paths[:, 0] = lengths
        paths[alone + node, sees.cumsum(1)[node, cell]] = contexts[of_node[node]] + cell
        first, counts, tree = r.prefill_offsets[:-1], trees.counts, np.arange(len(contexts))
        if window is not None:
            first, counts, tree = alone + np.arange(len(of_node)), 1, of_node
        first = np.concatenate([np.arange(alone), first])
        table = np.empty((len(first), 6), np.int64)
        table[:, 0], table[:, 3], table[:, 4] = first, _starts(lengths[first], window), lengths[first]
        table[:alone, 1], table[:alone, 2], table[:alone, 5] = 1, first[:alone], -1
        table[alone:, 1], table[alone:, 2], table[alone:, 5] = counts, alone + tree, contexts[tree]
        plain, branching = r.decode_blocks, r.prefill_blocks
        blocks = np.zeros((alone + len(branching), max(plain.shape[1], branching.shape[1])), np.int64)
        blocks[:alone, : plain.shape[1]], blocks[alone:, : branching.shape[1]] = plain, branching
        put = torch.from_numpy
        return Parts(torch.arange(len(lengths)), put(table), put(blocks), put(paths))

    def cascade_parts(self) -> Parts:
        """A part for each decode row behind what its cohort shares, and one for each cohort."""
        return self._once("cascade", self._cascade_parts)

    def _cascade_parts(self) -> Parts:
        r, count = self.rows, self.decode_count
        own, each = np.arange(count), np.ones(count)
        first, zero = count + r.cohort_offsets[:-1], np.zeros(len(r.cohort_common))
        leaders = r.cohort_rows[r.cohort_offsets[:-1]]
        common = first, np.diff(r.cohort_offsets), leaders, zero, r.cohort_common
        parts = zip(common, (own, each, own, self._own_starts(), r.decode_lengths))
        other = np.full(count, -1)
        other[r.cohort_rows] = count + np.arange(len(r.cohort_rows))
        return Parts(
            torch.from_numpy(np.concatenate([np.arange(count), r.cohort_rows])),
            _table(*map(np.concatenate, parts)),
            self.decode_blocks,
            other=torch.from_numpy(other),
        )

    def _own_starts(self) -> np.ndarray:
        """[D] tokens that a row's cohort reads for it."""
        r, starts = self.rows, np.zeros(self.decode_count, np.int64)
        starts[r.cohort_rows] = np.repeat(r.cohort_common, np.diff(r.cohort_offsets))
        return starts

    @property
    def cohorts(self) -> list[tuple[Tensor, Tensor]]:
        """(decode rows, shared blocks) of each cohort."""
        return self._once("cohorts", self._cohorts)

    def _cohorts(self) -> list[tuple[Tensor, Tensor]]:
        r, found = self.rows, []
        for first, end, common in zip(r.cohort_offsets[:-1], r.cohort_offsets[1:], r.cohort_common):
            rows = self._put(r.cohort_rows[first:end])
            found.append((rows, self.decode_blocks[rows[0], : common // self.block_size]))
        return found

    def own_blocks(self) -> tuple[Tensor, Tensor]:
        """[D * longest] blocks behind what the cohorts share, padded with block 0, and a mask as `decode_mask`."""
        return self._once("own", self._own_blocks)

    def _own_blocks(self) -> tuple[Tensor, Tensor]:
        starts = self._own_starts()
        lengths = self._put(self.rows.decode_lengths - starts).view(-1, 1)
        width = -(-int(lengths.max()) // self.block_size)
        at = self._put(starts // self.block_size).view(-1, 1) + torch.arange(width, device=self.device)
        last = self.decode_blocks.shape[1] - 1
        blocks = self.decode_blocks.gather(1, at.clamp(max=last)).masked_fill_(at > last, 0)
        at = torch.arange(width * self.block_size, device=self.device)
        return blocks.view(-1), _hiding(at >= lengths, torch.float32)


def _putter(device: str) -> Callable[[np.ndarray], Tensor]:
    return lambda array: torch.from_numpy(array).to(device, non_blocking=True)


def _starts(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """The first position that a row of this length sees."""
    return np.zeros_like(lengths) if window is None else np.maximum(0, lengths - window)


def _table(*columns: np.ndarray) -> Tensor:
    """Of parts without trees, from all columns of `Parts.table` but the last."""
    return torch.from_numpy(np.stack((*columns, np.full(len(columns[0]), -1)), 1).astype(np.int64))


def _hiding(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """[D, width] to [D, 1, 1, width]: -inf where hidden, else 0."""
    zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return zeros.masked_fill_(hidden, float("-inf"))[:, None, None]
