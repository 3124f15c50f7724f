"""Trees of guesses: which nodes count, and what is known at each."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, speculate

from sagellm.batch import Batch, Columns, Request, SamplingParams
from sagellm.trees import Trees, tree_rows

VOCABULARY = 4
END = 3


@st.composite
def branching(draw) -> Columns:
    """Two to four decodes, the last ones with guesses; tokens of END end a sequence."""
    count, columns = draw(st.integers(2, 4)), Columns(4, 40, 4)
    for row in range(count):
        known = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=9))
        columns.fill(row, Request(str(row), known, SamplingParams()), end=(END,))
        columns.prompt[row] -= 1
        columns.context[row], columns.new[row] = len(known) - 1, 1
    speculate(columns, range(draw(st.integers(0, count - 1)), count), VOCABULARY, draw)
    return columns


def paths(c: Columns, row: int) -> list[list[int]]:
    found = [[]]
    for i in range(c.drafted[row]):
        found.append([*found[c.draft_parents[row, i]], int(c.draft_tokens[row, i])])
    return found


@examples(100)
@given(branching(), st.integers(0, 2**32))
def test_the_nodes_that_count_are_those_that_a_walk_from_the_root_finds(c, seed):
    rows = np.flatnonzero(c.length > 0)
    trees = Trees.of(c, rows)
    chosen = np.random.default_rng(seed).integers(0, VOCABULARY, len(trees.rows))
    accepted = set(trees.accepted(c, chosen).tolist())
    known, first = trees.known(c), 0
    for row in rows:
        mine = paths(c, row)
        expected, path = set(), []
        while path in mine:
            expected.add(first + mine.index(path))
            token = int(chosen[first + mine.index(path)])
            if token == END:
                break
            path = [*path, token]
        assert {node for node in accepted if trees.rows[node] == row} == expected
        for node, path in enumerate(mine, first):
            length = c.length[row] + len(path)
            assert known[node, :length].tolist() == [*c.tokens[row, : c.length[row]], *path]
            assert trees.depths[node] == len(path)
            seen = {first + cell for cell in np.flatnonzero(trees.sees[node])}
            assert seen == {first + mine.index(path[:depth]) for depth in range(len(path) + 1)}
        first += len(mine)


def test_the_token_axis_has_sequences_without_guesses_first():
    c = Columns(3, 16, 4)
    for row, known in enumerate(([1, 2, 3], [4, 5], [6, 7, 8, 9])):
        c.fill(row, Request(str(row), known))
        c.context[row], c.new[row], c.blocks[row] = len(known) - 1, 1, np.arange(4) + 4 * row
    c.drafted[2], c.draft_tokens[2, :3], c.draft_parents[2, :3] = 3, [5, 6, 7], [0, 1, 0]
    batch = Batch(c, np.array([0, 1, 2]), np.zeros(0, np.int64))
    rows = tree_rows(batch, Trees.of(c, batch.decode))
    assert rows.tokens.tolist() == [3, 5, 9, 5, 6, 7]
    assert rows.positions.tolist() == [2, 1, 3, 4, 5, 4]
    assert rows.lengths.tolist() == [3, 2, 4, 5, 6, 5]
    assert rows.slots.tolist() == [2, 17, 35, 36, 37, 38]
    assert rows.decode_lengths.tolist() == [3, 2] and rows.prefill_lengths.tolist() == [7]
    assert rows.trees.nodes.tolist() == [[2, 3, 4, 5]]
    assert rows.trees.sees[0].astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
