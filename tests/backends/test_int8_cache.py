"""Keys and values as int8: what is written, what it takes, and how near its logits are to those of a float cache."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from test_attention import KERNELS, LACKING, ROUNDING, inputs, meaning, steps, tree_step

from sagellm.backends.aten import kernels
from sagellm.backends.aten.columns import AtenRows
from sagellm.backends.aten.int8 import int8, quantized, widened
from sagellm.backends.cpu import native
from sagellm.trees import tree_rows

NATIVE = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))


def random(seed: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


@given(st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=70))
@examples(50)
def test_a_number_comes_back_within_half_a_step(numbers):
    x = torch.tensor(numbers)
    back = widened(quantized(x), torch.float32)
    assert bool(((back - x).abs() <= x.abs().max() / 127 * 0.5001 + 1e-44).all())


def test_zeros_stay_zeros_and_what_is_no_number_stays_seen():
    assert torch.equal(widened(quantized(torch.zeros(2, 8)), torch.float32), torch.zeros(2, 8))
    for wrong in (float("nan"), float("inf")):
        x = torch.tensor([1.0, wrong, 2.0])
        assert bool(widened(quantized(x), torch.float32).isnan().any())


@NATIVE
@pytest.mark.parametrize("dtype", ROUNDING)
@given(rows=st.integers(1, 5), heads=st.integers(1, 4), half=st.integers(1, 40), seed=st.integers(0, 99))
@examples(25)
def test_native_kernels_write_the_bytes_of_stock_torch(dtype, rows, heads, half, seed):
    d = 2 * half
    q, k, v = random(seed, dtype, rows, 3 * heads * d).split([heads * d] * 3, -1)
    if rows > 1:
        v[1] = 0
    angles, slots = random(seed + 2, torch.float32, rows, d), torch.randperm(32)
    one, other = [torch.zeros(2, 4, 8, heads, d + 4, dtype=torch.int8) for _ in range(2)]
    same, shared = torch.arange(rows), torch.tensor([*range(rows), 0, rows - 1])
    for source in (None, shared):
        where = SimpleNamespace(slots=slots[: rows if source is None else len(source)], kv_source=source)
        native.kv_write(int8(one, dtype), k, v, where)
        kernels.kv_write(int8(other, dtype), k, v, where)
        assert torch.equal(one, other)
        turned = native.rope_kv_write(int8(one, dtype), q, k, v, angles, where, d)
        expected, keys = native.rope(q, k, angles, d)
        whole = SimpleNamespace(slots=where.slots, kv_source=same if source is None else source)
        kernels.kv_write(int8(other, dtype), keys, v, whole)
        assert torch.equal(one, other) and torch.equal(turned, expected)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("module", KERNELS)
@given(step=steps(), window=st.sampled_from([None, 5]))
@examples(8)
def test_decode_rows_read_numbers_times_scales(module, dtype, step, window):
    q, kv, rows, scale = inputs(step, dtype)
    packed = quantized(kv[0]), quantized(kv[1])
    rounds = torch.float32 if module is native else dtype
    exact = meaning(step, q, tuple(widened(x, rounds) for x in packed), scale, window)
    read = int8(packed, dtype)
    ours = [module.decode_attention(q, read, rows, scale, window)]
    if window is None:
        ours.append(module.cascade_attention(q, read, rows, scale))
    for out in ours:
        torch.testing.assert_close(out.double(), exact, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@NATIVE
@pytest.mark.parametrize("dtype", ROUNDING)
def test_trees_of_guesses_read_numbers_times_scales(dtype):
    batch, trees = tree_step(1, 16)
    rows = tree_rows(batch, trees)
    packed = quantized(random(1, dtype, 2, 1100, 16, 2, 32))
    q = random(2, dtype, len(rows.tokens), 2 * 4 * 32)
    for window in (None, 7):
        ours = native.tree_attention(q, int8(packed, dtype), AtenRows(rows, 16), 0.2, window)
        exact = kernels.tree_attention(
            q.float(), int8(packed, torch.float32), AtenRows(rows, 16), 0.2, window
        )
        torch.testing.assert_close(ours.float(), exact, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
