"""What vendors' kernels compute, in stock torch and float32: the parts that their references share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

GROUPS: dict[str, Callable[[Tensor], Tensor]] = {}
"""By the name of a group of ranks that runs in this process: the sum over them of what each brings."""


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """Zhang & Sennrich 2019, over the last dimension."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gamma.float()).to(x.dtype)


def silu_mul(x: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension."""
    first, second = x.float().chunk(2, -1)
    return (torch.nn.functional.silu(first) * second).to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Halves of the last dimension turn together; cos and sin are as wide as a half."""
    low, high = x.float().chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)


def pages(cache: Tensor, table: Tensor, lengths: Iterable[int]) -> list[Tensor]:
    """Of a cache [blocks, block size, N, D], the cached tokens [length, N, D] of each row of the block table."""
    size = cache.shape[1]
    return [cache[row[: -(-n // size)].long()].flatten(0, 1)[:n] for row, n in zip(table, lengths)]


def attention(
    q: Tensor, queries: list[int], keys: list[Tensor], values: list[Tensor], scale: float, left: int = -1
) -> Tensor:
    """Causal attention of q [T, H, D], sequence after sequence; the last query of each sees its last key.

    `left` is how many keys before its own each query sees; -1: all.
    """
    out, first = torch.empty_like(q), 0
    for count, k, v in zip(queries, keys, values, strict=True):
        heads = q[first : first + count].float().unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)
        scores = heads @ k.float().transpose(0, 1)[:, None].transpose(-1, -2) * scale
        at, key = torch.arange(len(k) - count, len(k))[:, None], torch.arange(len(k))
        hidden = key > at if left < 0 else (key > at) | (key < at - left)
        done = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v.float().transpose(0, 1)[:, None]
        out[first : first + count] = done.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
        first += count
    return out
