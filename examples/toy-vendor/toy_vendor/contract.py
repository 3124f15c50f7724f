"""What the Toy's two calls want and mean."""

from __future__ import annotations

from torch import Tensor

from sagellm.backends import references
from sagellm.backends.contract import Call, Contract, contiguous, same_dtype


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
    out.copy_(references.rms_norm(x, weight, eps))


def silu_and_mul(out: Tensor, x: Tensor) -> None:
    out.copy_(references.silu_mul(x))


def _halves(a) -> str | None:
    wide, narrow = a.x.shape[-1], a.out.shape[-1]
    return None if wide == 2 * narrow else f"x of {wide} columns, out of {narrow}; accepted: twice as many"


CONTRACT = Contract(
    modules=("toychip",),
    calls=(
        Call(
            "toychip.rms_norm(x, weight, out, *, eps)", rms_norm, "C", "docs/adding-a-vendor.md",
            (same_dtype("x", "weight", "out"), contiguous("x", "out")),
        ),
        Call(
            "toychip.silu_and_mul(out, x)", silu_and_mul, "C", "docs/adding-a-vendor.md",
            (same_dtype("x", "out"), _halves),
        ),
    ),
)  # fmt: skip
