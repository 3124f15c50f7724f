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
    sees: np.ndarray
    """[N, greatest count] bool: the cells of its tree on the way to it, itself included."""

    @classmethod
    def of(cls, c: Columns, rows: np.ndarray) -> Trees:
        counts = 1 + c.drafted[rows].astype(np.int64)
        ends = np.cumsum(counts)
        owner, nodes = np.repeat(rows, counts), np.arange(ends[-1] if len(ends) else 0)
        first = np.repeat(ends - counts, counts)
        cells = nodes - first
        guess, guessed = np.maximum(cells - 1, 0), cells > 0
        parents = first + np.where(guessed, c.draft_parents[owner, guess], 0)
        last = c.tokens[owner, c.length[owner] - 1]
        tokens = np.where(guessed, c.draft_tokens[owner, guess], last).astype(np.int64)
        sees = cells[:, None] == np.arange(int(counts.max(initial=1)))
        up, reach = parents, 1
        while reach < sees.shape[1]:  # each round looks twice as far up
            sees = sees | sees[up]
            up, reach = up[up], 2 * reach
        return cls(owner, cells, parents, sees.sum(1) - 1, tokens, counts, sees)

    def accepted(self, c: Columns, chosen: np.ndarray) -> np.ndarray:
        """The nodes whose chosen token int64 [N] counts: cell 0, and from there each guess that equals the choice
        before it, up to a token that ends the sequence."""
        goes_on = np.where((c.stops[self.rows] == chosen[:, None]).any(1), -1, chosen)
        wrong = (self.cells > 0) & (self.tokens != goes_on[self.parents])
        of_tree = np.arange(len(wrong)) - self.cells
        cells = np.minimum(of_tree[:, None] + np.arange(self.sees.shape[1]), len(wrong) - 1)
        return np.flatnonzero(~(self.sees & wrong[cells]).any(1))

    @property
    def paths(self) -> np.ndarray:
        """[N, greatest depth] the guesses from cell 0 to the node; -1 behind."""
        paths = np.full((len(self.rows), int(self.depths.max(initial=0))), -1, np.int64)
        node, cell = np.nonzero(self.sees[:, 1:])
        above = node - self.cells[node] + 1 + cell
        paths[node, self.depths[above] - 1] = self.tokens[above]
        return paths

    def known(self, c: Columns) -> np.ndarray:
        """int64 [N, longest]: the tokens up to each node, of which the first `length + depth` count."""
        paths = self.paths
        longest = int(c.length[self.rows].max()) + paths.shape[1]
        tokens = np.zeros((len(self.rows), longest), np.int64)
        width = min(longest, c.tokens.shape[1])
        tokens[:, :width] = c.tokens[self.rows, :width]
        nodes, at = np.nonzero(paths >= 0)
        tokens[nodes, c.length[self.rows[nodes]] + at] = paths[nodes, at]
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
