"""Keys and values as int8 with a float32 scale for each token and head, in stock torch.

A head's D numbers lie before the four bytes of its scale, so that blocks are copied and moved with their scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 4
"""Bytes of a scale."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., N] as int8 [..., N], and scales, float32 [...]: the largest magnitude is 127 of it."""
    wide = x.float()
    scales = wide.abs().amax(-1) / 127
    divisors = scales.clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / divisors[..., None]).round_().to(torch.int8), scales


def quantized(x: Tensor) -> Tensor:
    """[..., D] of a float type to int8 [..., D + 4]."""
    numbers, scales = quantize(x)
    return torch.cat([numbers, scales[..., None].view(torch.int8)], -1)


def widened(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 [..., D + 4] to [..., D] of a float type."""
    numbers, scale = packed.split([packed.shape[-1] - SCALE, SCALE], -1)
    scale = scale.clone(memory_format=torch.contiguous_format).view(torch.float32)  # aligned
    return (numbers.float() * scale).to(dtype)


class Int8:
    """Keys or values of a layer, as kernels in stock torch ask for [blocks, block size, N, D] of a float type."""

    def __init__(self, packed: Tensor, dtype: torch.dtype):
        """`packed`: int8 [blocks, block size, N, D + 4]."""
        self.packed, self.dtype = packed, dtype
        self.shape = (*packed.shape[:-1], packed.shape[-1] - SCALE)

    def index_select(self, dim: int, blocks: Tensor) -> Tensor:
        return widened(self.packed.index_select(dim, blocks), self.dtype)

    def write(self, slots: Tensor, x: Tensor) -> None:
        """Put [T, N * D] into these slots."""
        heads = x.unflatten(-1, self.shape[2:])
        self.packed.flatten(0, 1).index_copy_(0, slots, quantized(heads))


def int8(kv: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Int8, Int8]:
    """A layer's keys and values, read in this type."""
    return Int8(kv[0], dtype), Int8(kv[1], dtype)
