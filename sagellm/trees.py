"""Trees of guessed tokens, and the token axis of a step that verifies them. Leaf, numpy only.

A sequence that speculates has `drafted` guesses, in the columns `draft_tokens` and `draft_parents`. Its nodes are
cells: cell 0 is the last known token, cell i the i-th guess. Parents stand before their children, the likeliest path
first. Keys and values of cell i lie i places behind the context, until the accepted path is moved together.
"""

from __future__ import annotations

import numpy as np
from attrs import frozen

from sagellm.batch import Batch, Columns
from sagellm.rows import Rows, TreeRows


@frozen
class Trees:
    """N nodes of D sequences, sequence after sequence. Integer arrays [N] unless said otherwise."""

    rows: np.ndarray
    """The sequence."""
    cells: np.ndarray
    parents: np.ndarray
    """The node before; of a cell 0, itself."""
    depths: np.ndarray
    """How many guesses it stands on, itself included."""
    tokens: np.ndarray
    counts: np.ndarray
    """[D] nodes of each sequence."""
    paths: np.ndarray
    """[N, greatest depth] the guesses from cell 0 to the node; -1 behind."""
    sees: np.ndarray
    """[N, greatest count] bool: the cells of its tree on the way to it, itself included."""

    @classmethod
    def of(cls, c: Columns, rows: np.ndarray) -> Trees:
        counts = 1 + c.drafted[rows].astype(np.int64)
        ends = np.cumsum(counts)
        owner, nodes = np.repeat(rows, counts), np.arange(ends[-1] if len(ends) else 0)
        first = np.repeat(ends - counts, counts)
        cells = nodes - first
        guess = np.maximum(cells - 1, 0)
        guessed = cells > 0
        parents = first + np.where(guessed, c.draft_parents[owner, guess], 0)
        last = c.tokens[owner, c.length[owner] - 1]
        tokens = np.where(guessed, c.draft_tokens[owner, guess], last).astype(np.int64)
        sees = np.zeros((len(nodes), int(counts.max(initial=1))), bool)
        depths, at = np.zeros_like(nodes), nodes
        while True:
            sees[nodes, cells[at]] = True
            if not (moving := guessed[at]).any():
                break
            depths += moving
            at = np.where(moving, parents[at], at)
        paths, at = np.full((len(nodes), int(depths.max(initial=0))), -1, np.int64), nodes
        while (moving := guessed[at]).any():
            paths[nodes[moving], depths[at[moving]] - 1] = tokens[at[moving]]
            at = np.where(moving, parents[at], at)
        return cls(owner, cells, parents, depths, tokens, counts, paths, sees)

    def accepted(self, c: Columns, chosen: np.ndarray) -> np.ndarray:
        """The nodes whose chosen token int64 [N] counts: cell 0, and from there each guess that equals the choice
        before it, up to a token that ends the sequence."""
        ends = (c.stops[self.rows] == chosen[:, None]).any(1)
        follows = (self.cells > 0) & (self.tokens == chosen[self.parents]) & ~ends[self.parents]
        taken = self.cells == 0
        for depth in range(1, self.paths.shape[1] + 1):
            at = np.flatnonzero(follows & (self.depths == depth))
            taken[at] = taken[self.parents[at]]
        return np.flatnonzero(taken)

    def known(self, c: Columns) -> np.ndarray:
        """int64 [N, longest]: the tokens up to each node, of which the first `length + depth` count."""
        longest = int(c.length[self.rows].max()) + self.paths.shape[1]
        tokens = np.zeros((len(self.rows), longest), np.int64)
        width = min(longest, c.tokens.shape[1])
        tokens[:, :width] = c.tokens[self.rows, :width]
        nodes, at = np.nonzero(self.paths >= 0)
        tokens[nodes, c.length[self.rows[nodes]] + at] = self.paths[nodes, at]
        return tokens


def slots(c: Columns, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Where keys and values of these positions lie: block * block_size + offset."""
    blocks = c.blocks[rows, positions // c.block_size].astype(np.int64)
    return blocks * c.block_size + positions % c.block_size


def tree_rows(batch: Batch, trees: Trees) -> Rows:
    """The token axis of a step of decodes: sequences without guesses first, then the nodes of the others' trees."""
    c, decode = batch.columns, batch.decode
    alone = int(np.count_nonzero(trees.counts == 1))
    plain, branching = decode[:alone], decode[alone:]
    counts = trees.counts[alone:]
    offsets = alone + np.concatenate([[0], np.cumsum(counts)])
    positions = c.context[trees.rows] + trees.depths
    cells = np.arange(int(counts.max(initial=1)))
    nodes = offsets[:-1, None] + np.where(cells < counts[:, None], cells, 0)
    lengths = c.context[branching] + counts
    none = np.zeros(0, np.int64)
    return Rows(
        tokens=trees.tokens,
        positions=positions.astype(np.int64),
        lengths=positions.astype(np.int64) + 1,
        slots=slots(c, trees.rows, c.context[trees.rows] + trees.cells),
        kv_source=None,
        outputs=np.arange(len(trees.rows)),
        prompt_rows=none,
        prompt_positions=none,
        decode_blocks=_table(c, plain, c.context[plain] + 1),
        decode_lengths=c.context[plain] + 1,
        cohort_rows=none,
        cohort_offsets=np.zeros(1, np.int64),
        cohort_common=none,
        prefill_blocks=_table(c, branching, lengths),
        prefill_lengths=lengths,
        prefill_offsets=offsets,
        trees=TreeRows(nodes, trees.sees[nodes], counts),
    )


def _table(c: Columns, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    entries = -(-int(lengths.max(initial=0)) // c.block_size)
    return c.blocks[rows, :entries].astype(np.int64)
