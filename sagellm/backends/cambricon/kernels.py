"""What takes more than one call of torch_mlu_ops."""

from __future__ import annotations

import torch
from torch import Tensor


def sin_cos(table: Tensor) -> Tensor:
    """Cos and sin [P, D], each of half the width as in `cos_sin_table`, to [2, P, D]: sin, cos, each half twice."""
    cos, sin = table.chunk(2, -1)
    return torch.stack([sin.repeat(1, 2), cos.repeat(1, 2)])
