"""Which decode rows have the same first KV blocks, so that attention may read these once for all of them.

Keys and values that several sequences share lie in the same blocks: those of a common prompt, of a conversation that
goes on in several ways, of a request's `n` samples. Block tables say it all; no token is compared.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from attrs import frozen

from sagellm.batch import Columns

Gain = Callable[[int, int], float]
"""(rows, tokens) -> seconds of a step that these rows save by reading so many tokens together."""


@frozen
class Cohorts:
    """By decode row: `cohort` -1 and `common` 0 where a row reads alone."""

    cohort: np.ndarray
    common: np.ndarray
    gain: float
    """Seconds of a step."""
    longest: int
    """Tokens of whole blocks that two rows have in common, whether or not it pays to read them together."""


def find_cohorts(c: Columns, rows: np.ndarray, gain: Gain) -> Cohorts:
    """The cohorts that gain most. Every row is in one at most: of nested ones, the outer or the inner.

    Block tables in order are a tree whose branches are ranges of neighbours; a branch that gains less than its
    branches together gives way to them.
    """
    cohort, common = np.full(len(rows), -1, np.int32), np.zeros(len(rows), np.int32)
    full = c.context[rows] // c.block_size
    order, alike = _neighbours(c, rows, full)
    total, taken = _best(alike, lambda count, blocks: gain(count, blocks * c.block_size))
    for first, last, blocks in taken:
        members = order[first : last + 1]
        cohort[members], common[members] = rows[members[0]], blocks * c.block_size
    longest = int(alike.max()) * c.block_size if len(alike) else 0
    return Cohorts(cohort, common, total, longest)


def _neighbours(c: Columns, rows: np.ndarray, full: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order of the rows, and [rows - 1] how many full blocks each has in common with its successor."""
    first = np.where(full > 0, c.blocks[rows, 0], -1)
    values, counts = np.unique(first, return_counts=True)
    several = np.flatnonzero(np.isin(first, values[(counts > 1) & (values >= 0)]))
    if not len(several):
        return several, np.zeros(0, np.int64)
    width = int(full[several].max())
    table = np.where(np.arange(width) < full[several, None], c.blocks[rows[several], :width], -1)
    order = np.lexsort(table.T[::-1])
    table = table[order]
    differ = (table[1:] != table[:-1]) | (table[1:] < 0)
    return several[order], np.where(differ.any(1), differ.argmax(1), width)


def _best(alike: np.ndarray, gain: Gain) -> tuple[float, list[tuple[int, int, int]]]:
    """Gain and cohorts (first row, last row, blocks); `alike` says what neighbours have in common.

    One walk over the branches, inner ones first: `path` holds those that are open, from the root.
    """
    path: list[tuple[int, int, float, list]] = [(0, 0, 0.0, [])]
    for row, blocks in enumerate([*alike.tolist(), 0]):
        first, gained, taken = row, 0.0, []
        while path[-1][0] > blocks:
            shared, first, more, others = path.pop()
            gained, taken = gained + more, others + taken
            whole = gain(row - first + 1, shared)
            if whole > 0 and whole >= gained:
                gained, taken = whole, [(first, row, shared)]
        if path[-1][0] == blocks:
            _, first, more, others = path.pop()
            gained, taken = gained + more, others + taken
        path.append((blocks, first, gained, taken))
    return path[0][2:]
