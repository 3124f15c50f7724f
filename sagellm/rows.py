"""From a batch to the flattened token axis: the columns that kernels read. Leaf, numpy only.

Decodes stand first, then the prefills' tokens, sequence after sequence. A row that shares a beginning with its
leader starts behind it; its output row may lie in the leader's tokens when nothing is left to forward.
"""

from __future__ import annotations

import numpy as np
from attrs import frozen

from sagellm.batch import Batch, Columns


@frozen
class TreeRows:
    """P trees of guesses, W nodes in the largest; see `sagellm.trees`."""

    nodes: np.ndarray
    """[P, W] tokens on the flattened axis; where a tree has fewer, its first again."""
    sees: np.ndarray
    """[P, W, W] bool: which nodes of its tree each one attends to, beside the context."""
    counts: np.ndarray
    """[P] nodes."""


@frozen
class Rows:
    """T tokens, R output rows, D decodes, P prefills. Integer arrays; offsets and lengths in tokens."""

    tokens: np.ndarray
    """[T] token ids."""
    positions: np.ndarray
    """[T] position in the sequence."""
    lengths: np.ndarray
    """[T] known length of the token's sequence."""
    slots: np.ndarray
    """[T + E] where keys and values go: block * block_size + offset; E copies for rows that share."""
    kv_source: np.ndarray | None
    """[T + E] which token each slot gets its keys and values from; None when E is 0."""
    outputs: np.ndarray
    """[R + E] tokens whose logits are wanted: R to choose the next one, E for the logprobs of prompts."""
    prompt_rows: np.ndarray
    """[E] the sequence of each of the latter."""
    prompt_positions: np.ndarray
    """[E] its position; its logits are about the token behind it."""
    decode_blocks: np.ndarray
    """[D, blocks of the longest] block table."""
    decode_lengths: np.ndarray
    """[D] cached tokens, this step's included."""
    cohort_rows: np.ndarray
    """[M] decode rows that read a common beginning together, cohort after cohort; numbers among the D."""
    cohort_offsets: np.ndarray
    """[C + 1] first of each cohort."""
    cohort_common: np.ndarray
    """[C] tokens that a cohort reads together: whole blocks, equal in the block tables of its rows."""
    prefill_blocks: np.ndarray
    """[P, blocks of the longest]."""
    prefill_lengths: np.ndarray
    """[P] cached tokens, this step's included."""
    prefill_offsets: np.ndarray
    """[P + 1] first token of each prefill on the token axis."""
    trees: TreeRows | None = None
    """Where guesses are verified: P counts the sequences that have some, in place of prefills."""

    @property
    def forwarded(self) -> int:
        return len(self.tokens)


def build_rows(batch: Batch, *, shared: bool = False, cascade: bool = False) -> Rows:
    c, block_size = batch.columns, batch.columns.block_size
    decode, prefill = batch.decode, batch.prefill
    positions, sequences = c.context[decode], decode
    outputs = np.arange(len(decode))
    offsets, source = np.zeros(1, np.int64), None
    extra_positions = extra_rows = wanted = np.zeros(0, np.int64)
    working = prefill
    if len(prefill):
        start = c.context + (c.shared if shared else 0)
        counts = (c.context + c.new - start)[prefill].astype(np.int64)
        offsets = len(decode) + np.concatenate([[0], np.cumsum(counts)])
        total = offsets[-1] - len(decode)
        within = np.arange(total) - np.repeat(offsets[:-1] - len(decode), counts)
        positions = np.concatenate([positions, np.repeat(start[prefill], counts) + within])
        sequences = np.concatenate([decode, np.repeat(prefill, counts)])
        first = np.zeros(c.capacity, np.int64)
        first[prefill] = offsets[:-1] - start[prefill]
        ends = batch.output_rows()[len(decode) :]
        last = c.length[ends] - 1
        outputs = np.concatenate([outputs, _token_of(c, ends, last, start, first)])
        reported = (c.prompt_logprobs[sequences] >= 0) & (positions < c.prompt[sequences] - 1)
        wanted = np.flatnonzero(reported & (positions >= c.computed[sequences]))
        outputs = np.concatenate([outputs, wanted])
        if shared:
            extra_rows, extra_positions = _own_shared_positions(c, prefill)
            if len(extra_rows):
                copies = _token_of(c, extra_rows, extra_positions, start, first)
                source = np.concatenate([np.arange(len(positions)), copies])
        working = prefill[counts > 0]
        offsets = np.concatenate([offsets[:-1][counts > 0], offsets[-1:]])
    slots = _slots(c, sequences, positions)
    if source is not None:
        slots = np.concatenate([slots, _slots(c, extra_rows, extra_positions)])
    decode_lengths = c.context[decode] + 1
    prefill_lengths = (c.context + c.new)[working]
    cohorts = _cohorts(c, decode) if cascade else NO_COHORTS
    return Rows(
        tokens=c.tokens[sequences, positions].astype(np.int64),
        positions=positions.astype(np.int64),
        lengths=c.length[sequences].astype(np.int64),
        slots=slots,
        kv_source=source,
        outputs=outputs,
        prompt_rows=sequences[wanted],
        prompt_positions=positions[wanted],
        decode_blocks=c.blocks[decode, : _blocks(decode_lengths, block_size)].astype(np.int64),
        decode_lengths=decode_lengths,
        cohort_rows=cohorts[0],
        cohort_offsets=cohorts[1],
        cohort_common=cohorts[2],
        prefill_blocks=c.blocks[working, : _blocks(prefill_lengths, block_size)].astype(np.int64),
        prefill_lengths=prefill_lengths,
        prefill_offsets=offsets,
    )


NO_COHORTS = np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.int64)


def _cohorts(c: Columns, decode: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`cohort_rows`, `cohort_offsets`, `cohort_common`: of some cohorts, only a part may decode in this step."""
    members = np.flatnonzero(c.common[decode] > 0)
    members = members[np.argsort(c.cohort[decode[members]], kind="stable")]
    _, first = np.unique(c.cohort[decode[members]], return_index=True)
    return members, np.append(first, len(members)), c.common[decode[members[first]]].astype(np.int64)


def _blocks(lengths: np.ndarray, block_size: int) -> int:
    return -(-int(lengths.max()) // block_size) if len(lengths) else 0


def _slots(c: Columns, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    blocks = c.blocks[rows, positions // c.block_size].astype(np.int64)
    return blocks * c.block_size + positions % c.block_size


def _token_of(
    c: Columns, rows: np.ndarray, positions: np.ndarray, start: np.ndarray, first: np.ndarray
) -> np.ndarray:
    """The token on the flattened axis that computes a position of a row: its own, or one of a leader up the chain."""
    rows = rows.copy()
    while (above := positions < start[rows]).any():
        rows[above] = c.leader[rows[above]]
    return first[rows] + positions


def aliased_blocks(c: Columns, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Range [from, to) of block table entries that a sharing row takes over from its leader."""
    start = c.context[rows] + c.shared[rows]
    low = -(-c.context[rows] // c.block_size)
    return low, np.maximum(low, start // c.block_size)


def _own_shared_positions(c: Columns, prefill: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shared positions that fall into blocks of the row itself: their keys and values are written there too."""
    followers = prefill[c.shared[prefill] > 0]
    low, high = aliased_blocks(c, followers)
    rows, positions = [], []
    for row, begin, end in zip(followers, low * c.block_size, high * c.block_size):
        context, start = c.context[row], c.context[row] + c.shared[row]
        own = [p for p in range(context, start) if not begin <= p < end]
        rows += [row] * len(own)
        positions += own
    return np.array(rows, np.int64), np.array(positions, np.int64)
