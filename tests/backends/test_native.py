"""The fused kernels compute what stock torch computes, on every shape and on rows that lie apart."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.backends.aten import kernels
from sagellm.backends.cpu import native, packing

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}
sizes = st.integers(1, 70)
some = settings(max_examples=40)


def random(seed: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Within a rounding or two of the type, against the same formula in float32."""
    tolerance = DTYPES[ours.dtype]
    torch.testing.assert_close(ours.float(), exact.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 5), n=sizes, seed=st.integers(0, 99))
@some
def test_norms(dtype, rows, n, seed):
    x, y, w = random(seed, dtype, rows, n), random(seed + 1, dtype, rows, n), random(seed + 2, dtype, n)
    close(native.rms_norm(x, w, 1e-6), kernels.rms_norm(x.float(), w.float(), 1e-6))
    total, normed = native.add_rms_norm(x, y, w, 1e-6)
    assert torch.equal(total, x + y)
    close(normed, kernels.rms_norm(total.float(), w.float(), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 5), heads=st.integers(1, 4), half=st.integers(1, 40), seed=st.integers(0, 99))
@some
def test_heads_of_rows_that_lie_apart(dtype, rows, heads, half, seed):
    width = heads * half * 2
    q, k, v = random(seed, dtype, rows, 3 * width).split([width] * 3, -1)
    w, angles = random(seed + 1, dtype, 2 * half), random(seed + 2, torch.float32, rows, 2 * half)
    close(native.head_norm(q, w, 1e-6), kernels.head_norm(q.float(), w.float(), 1e-6))
    for ours, exact in zip(
        native.rope(q, k, angles, 2 * half), kernels.rope(q.float(), k.float(), angles, 2 * half)
    ):
        torch.testing.assert_close(ours.float(), exact, rtol=DTYPES[dtype], atol=20 * DTYPES[dtype])
    one, other = [[torch.zeros(4, 8, heads, 2 * half, dtype=dtype) for _ in range(2)] for _ in range(2)]
    slots = torch.randperm(32, generator=torch.Generator().manual_seed(seed))[:rows]
    for source in (None, torch.arange(rows).flip(0)):
        where = SimpleNamespace(slots=slots, kv_source=source)
        native.kv_write(tuple(one), k, v, where)
        kernels.kv_write(tuple(other), k, v, where)
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 5), n=sizes, seed=st.integers(0, 99))
@some
def test_silu_mul(dtype, rows, n, seed):
    x = random(seed, dtype, rows, 2 * n) * 10
    close(native.silu_mul(x), kernels.silu_mul(x.float()))


def test_silu_mul_at_the_ends_of_the_range():
    x = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(native.silu_mul(x), kernels.silu_mul(x.clone()), rtol=1e-6, atol=1e-30)


def test_without_a_compiler_the_emitted_code_is_stock_torch(monkeypatch):
    from sagellm import backends
    from sagellm.ir.graph import IRGraph

    monkeypatch.setattr(native, "unavailable", lambda: "no C compiler")
    text = (
        "nn.func @f(%x: tensor<?x8xf32>) -> tensor<?x4xf32> {\n"
        "  %m = nn.silu_mul %x : tensor<?x4xf32>\n  nn.return %m\n}"
    )
    assert "m = aten.silu_mul(x)" in backends.load("cpu").emit(IRGraph.parse(text), "f").source


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 2), (128, 896), (192, 62), (1152, 896), (100, 64), (64, 63)])
@pytest.mark.parametrize("biased", [True, False])
def test_one_row_times_a_packed_matrix(dtype, shape, biased):
    """Shapes that native.c cannot read (outputs no multiple of 64, an odd input, small ones) go through oneDNN."""
    w, x = random(1, dtype, *shape), random(2, dtype, 1, shape[1])
    bias = random(3, dtype, shape[0]) if biased else None
    if not packing.packs(dtype):
        pytest.skip(f"this processor has no packed product in {dtype}")
    packed = native.pack_onednn(w)
    if shape[0] % 64 or shape[1] % 2:
        assert packed.address is None
    exact = torch.nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
    roundings = DTYPES[dtype] * float((x.double().abs() @ w.double().abs().T).max())
    ours = native.linear_onednn(x, packed, bias).double()
    torch.testing.assert_close(ours, exact, rtol=DTYPES[dtype], atol=roundings)
    both = torch.cat([x, x])
    again = native.linear_onednn(both, packed, bias).double()
    torch.testing.assert_close(again[:1], exact, rtol=DTYPES[dtype], atol=roundings)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 250), n=st.integers(1, 70), k=st.integers(1, 70), biased=st.booleans())
@some
def test_a_product_with_a_matrix_in_panels(dtype, rows, n, k, biased):
    w, x = random(1, dtype, n, k), random(2, dtype, rows, k)
    bias = random(3, dtype, n) if biased else None
    exact = torch.nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
    packed = native.pack_panels(w)
    roundings = DTYPES[dtype] * float((x.double().abs() @ w.double().abs().T).max())
    for module in (native, packing):
        ours = module.linear_panels(x, packed, bias)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=DTYPES[dtype], atol=roundings)
    whole = native.linear_panels(x, packed, bias)
    for first, count in ((0, 1), (rows // 3, 4), (rows // 2, 7)):
        some = native.linear_panels(x[first : first + count], packed, bias)
        assert torch.equal(some, whole[first : first + count]), "a row's result depends on the rows beside it"
    apart = random(4, dtype, rows, 2 * k)[:, k:]
    again = native.linear_panels(apart, packed, bias)
    assert torch.equal(again, native.linear_panels(apart.contiguous(), packed, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_are_read_as_what_they_are(dtype):
    """A piece of a split product is not contiguous; an edited graph may hand it to any kernel."""
    wide, w = random(4, dtype, 3, 64), random(5, dtype, 16)
    x, y = wide[:, 8:24], wide[:, 40:56]
    close(native.rms_norm(x, w, 1e-6), kernels.rms_norm(x.float(), w.float(), 1e-6))
    assert torch.equal(native.add_rms_norm(x, y, w, 1e-6)[0], x + y)
    close(native.silu_mul(x), kernels.silu_mul(x.float()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@given(rows=st.integers(1, 5), heads=st.integers(1, 3), half=st.integers(1, 20), seed=st.integers(0, 99))
@some
def test_rotation_and_write_in_one(dtype, normed, rows, heads, half, seed):
    """Also for tokens whose keys and values go to a second slot."""
    d = 2 * half
    sizes = [2 * heads * d, heads * d, heads * d]
    q, k, v = random(seed, dtype, rows, sum(sizes)).split(sizes, -1)
    angles = random(seed + 1, torch.float32, rows, d) / 3
    norms = (random(seed + 2, dtype, d), random(seed + 3, dtype, d), 1e-5) if normed else None
    exact_norms = norms and (norms[0].float(), norms[1].float(), norms[2])
    ours, exact = [torch.zeros(2, 4, 8, heads, d, dtype=kind) for kind in (dtype, torch.float32)]
    slots = torch.randperm(32, generator=torch.Generator().manual_seed(seed))[: 2 * rows]
    for copies in (0, rows):
        source = torch.cat([torch.arange(rows), torch.arange(copies).flip(0)]) if copies else None
        where = SimpleNamespace(slots=slots[: rows + copies], kv_source=source)
        y = native.rope_kv_write(tuple(ours), q, k, v, angles, where, d, norms)
        wide = (x.float() for x in (q, k, v))
        z = kernels.rope_kv_write(tuple(exact), *wide, angles, where, d, exact_norms)
        for one, other in ((y, z), (ours, exact)):
            torch.testing.assert_close(one.float(), other, rtol=DTYPES[dtype], atol=20 * DTYPES[dtype])
