"""Matrices in the layouts that the CPU's products read fastest."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from sagellm.backends.cpu.memory import bound_primitive_caches, huge_pages

bound_primitive_caches()


class Packed:
    """A matrix [outputs, inputs] in a layout of oneDNN's or in panels; where its bytes are if others may read them."""

    __slots__ = ("address", "outputs", "tensor")

    def __init__(self, tensor: Tensor, outputs: int):
        self.tensor, self.outputs = tensor, outputs
        self.address: int | None = None


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have oneDNN's packed product for the type (bfloat16 wants AVX-512)."""
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), 16)
        torch.ops.mkldnn._linear_pointwise(torch.zeros(1, 16, dtype=dtype), weight, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return False
    return True


def pack_onednn(weight: Tensor) -> Packed:
    """[out, in] reordered for oneDNN's matrix product, on huge pages.

    Packed for 16 rows: as fast as any other at 1 to 16 rows, and twice as fast in float32 at one.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
    huge_pages(torch.ops.mkldnn.data_ptr(packed), weight.nbytes)
    return Packed(packed, weight.shape[0])


def linear_onednn(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight.tensor, bias, "none", [], "")


PANEL = 16
"""Outputs that stand side by side in a matrix in panels."""


def pack_panels(weight: Tensor) -> Packed:
    """[out, in] as [panels, in, 16], on huge pages; the last panel is filled up with zeros."""
    outputs, inputs = weight.shape
    whole = pad(weight, (0, 0, 0, -outputs % PANEL))
    packed = whole.view(-1, PANEL, inputs).transpose(1, 2).contiguous()
    huge_pages(packed.data_ptr(), packed.nbytes)
    return Packed(packed, outputs)


def linear_panels(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    return linear(x, weight.tensor.transpose(1, 2).flatten(0, 1)[: weight.outputs], bias)
