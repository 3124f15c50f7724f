"""Attention of decode rows is the plain one: over blocks in any order and size, and with beginnings read together."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from sagellm.backends.aten import kernels
from sagellm.backends.aten.columns import AtenRows
from sagellm.backends.cpu import native
from sagellm.batch import Batch, Columns
from sagellm.rows import build_rows
from sagellm.trees import Trees, slots, tree_rows

LACKING = native.unavailable()
KERNELS = [kernels, pytest.param(native, marks=pytest.mark.skipif(LACKING is not None, reason=str(LACKING)))]
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@st.composite
def steps(draw):
    """Rows of a decode step, some in cohorts: (rows, block size, KV heads, queries a KV head, head size, seed)."""
    block_size = draw(st.sampled_from([1, 4, 16]))
    cohorts = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=3))
    free = iter(np.random.default_rng(draw(st.integers(0, 99))).permutation(np.arange(1, 400)))
    tables, lengths, members, offsets, common = [], [], [], [0], []
    for count, blocks in cohorts:
        shared = [next(free) for _ in range(blocks)]
        if blocks:
            members += range(len(tables), len(tables) + count)
            offsets.append(len(members))
            common.append(blocks * block_size)
        for _ in range(count):
            own = draw(st.integers(1, 3 * block_size))
            tables.append([*shared, *(next(free) for _ in range(-(-own // block_size)))])
            lengths.append(blocks * block_size + own)
    width = max(map(len, tables))
    rows = SimpleNamespace(
        decode_blocks=np.array([table + [0] * (width - len(table)) for table in tables], np.int64),
        decode_lengths=np.array(lengths, np.int32),
        cohort_rows=np.array(members, np.int64),
        cohort_offsets=np.array(offsets, np.int64),
        cohort_common=np.array(common, np.int64),
        kv_source=None,
        trees=None,
        prefill_lengths=np.zeros(0, np.int32),
        prefill_offsets=np.array([len(tables)]),
        **{name: np.zeros(0, np.int64) for name in ("tokens", "positions", "lengths", "slots", "outputs")},
    )
    heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 7, 8, 12]))
    return rows, block_size, heads, group, draw(st.sampled_from([4, 6, 16, 18])), draw(st.integers(0, 99))


def inputs(step, dtype):
    rows, block_size, heads, group, head_dim, seed = step
    made = torch.Generator().manual_seed(seed)
    kv = torch.randn(2, 400, block_size, heads, head_dim, generator=made).to(dtype)
    q = torch.randn(len(rows.decode_lengths), heads * group * head_dim, generator=made).to(dtype)
    return q, (kv[0], kv[1]), AtenRows(rows, block_size), head_dim**-0.5


def meaning(step, q, kv, scale, window=None):
    """Row by row and head by head, in float64."""
    rows, _, heads, group, head_dim, _ = step
    out = []
    for i, (table, length) in enumerate(zip(rows.decode_blocks, rows.decode_lengths)):
        first = 0 if window is None else max(0, int(length) - window)
        keys, values = (x[torch.from_numpy(table)].flatten(0, 1)[first:length].double() for x in kv)
        for head in range(heads * group):
            query = q[i].double().view(-1, head_dim)[head]
            weights = (keys[:, head // group] @ query * scale).softmax(0)
            out.append(weights @ values[:, head // group])
    return torch.stack(out).view(q.shape)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("module", KERNELS)
@given(step=steps(), window=st.sampled_from([None, 1, 5, 40]))
@examples(25)
def test_decode_rows_over_their_blocks(module, dtype, step, window):
    q, kv, rows, scale = inputs(step, dtype)
    ours = module.decode_attention(q, kv, rows, scale, window)
    exact = meaning(step, q, kv, scale, window)
    torch.testing.assert_close(ours.double(), exact, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("module", KERNELS)
@given(step=steps())
@examples(25)
def test_what_is_read_together_is_what_each_reads_alone(module, dtype, step):
    q, kv, rows, scale = inputs(step, dtype)
    ours = module.cascade_attention(q, kv, rows, scale)
    torch.testing.assert_close(
        ours.double(), meaning(step, q, kv, scale), rtol=ROUNDING[dtype], atol=ROUNDING[dtype]
    )


def tree_step(draw_from: int, block_size: int) -> tuple[Batch, Trees]:
    """A sequence that decodes alone, and two with guesses whose paths part."""
    random = np.random.default_rng(draw_from)
    columns = Columns(3, 400, block_size)
    for row, guesses in enumerate((0, 5, 9)):
        length = int(random.integers(1, 350))
        columns.length[row], columns.context[row] = length, length - 1
        columns.blocks[row, : -(-360 // block_size)] = 1 + row + 3 * random.permutation(-(-360 // block_size))
        columns.drafted[row] = guesses
        columns.draft_parents[row, :guesses] = [random.integers(0, at + 1) for at in range(guesses)]
    batch = Batch(columns, np.arange(3), np.zeros(0, np.int64))
    return batch, Trees.of(columns, batch.decode)


@pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("window", [None, 1, 7, 120])
@pytest.mark.parametrize(
    ("group", "head_dim", "block_size"), [(1, 16, 4), (4, 32, 16), (7, 18, 16), (12, 64, 3)]
)
def test_a_guess_is_read_bit_for_bit_as_a_plain_row(dtype, window, group, head_dim, block_size):
    """The plain row has the guesses before it where its tree has them in other cells."""
    for draw_from in range(3):
        batch, trees = tree_step(draw_from, block_size)
        c, rows = batch.columns, tree_rows(batch, trees)
        made = torch.Generator().manual_seed(draw_from)
        kv = torch.randn(2, 1100, block_size, 2, head_dim, generator=made).to(dtype)
        q = torch.randn(len(rows.tokens), 2 * group * head_dim, generator=made).to(dtype)
        ours = native.tree_attention(q, (kv[0], kv[1]), AtenRows(rows, block_size), 0.2, window)
        stock = kernels.tree_attention(q, (kv[0], kv[1]), AtenRows(rows, block_size), 0.2, window)
        torch.testing.assert_close(ours, stock, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
        for node, (row, sees) in enumerate(zip(trees.rows, trees.sees)):
            path = c.context[row] + np.flatnonzero(sees)
            plain = kv.clone().flatten(1, 2)
            lie, belong = (
                slots(c, np.full(len(path), row), at) for at in (path, c.context[row] + np.arange(len(path)))
            )
            plain[:, torch.from_numpy(belong)] = kv.flatten(1, 2)[:, torch.from_numpy(lie)]
            plain = plain.view(kv.shape)
            one = Batch(c, np.array([row]), np.zeros(0, np.int64))
            alone = build_rows(one)
            alone.decode_lengths[:] = c.context[row] + len(path)
            alone = evolve(alone, decode_blocks=c.blocks[[row]].astype(np.int64))
            expected = native.decode_attention(
                q[node : node + 1], (plain[0], plain[1]), AtenRows(alone, block_size), 0.2, window
            )
            assert torch.equal(ours[node : node + 1], expected)


@pytest.mark.parametrize("module", KERNELS)
def test_a_score_that_outweighs_all_others(module):
    """The log of the denominator is far beyond what a float can hold without it."""
    rows = SimpleNamespace(
        decode_blocks=np.array([[1, 2], [1, 3]]),
        decode_lengths=np.array([6, 8]),
        cohort_rows=np.array([0, 1]),
        cohort_offsets=np.array([0, 2]),
        cohort_common=np.array([4]),
        kv_source=None,
        trees=None,
        prefill_lengths=np.zeros(0, np.int32),
        prefill_offsets=np.array([2]),
        **{name: np.zeros(0, np.int64) for name in ("tokens", "positions", "lengths", "slots", "outputs")},
    )
    step = rows, 4, 1, 2, 8, 0
    q, kv, columns, scale = inputs(step, torch.float32)
    kv[0][1, 2] = 400 * q.view(2, 2, 8)[0, 0]
    kv[0][3, 1] = 900 * q.view(2, 2, 8)[1, 1]
    ours = module.cascade_attention(q, kv, columns, scale)
    torch.testing.assert_close(ours.double(), meaning(step, q, kv, scale), rtol=2e-5, atol=2e-5)
