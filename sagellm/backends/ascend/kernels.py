"""What takes several calls of torch_npu. T tokens, H query heads, N KV heads, D head size."""

from __future__ import annotations

import torch
from torch import Tensor

from sagellm.backends import sampling
from sagellm.backends.aten import kernels as aten

MASK = 2048
"""Side of the mask that the attention wants for its compressed modes, whatever the lengths."""
MOST_KEPT = 1024
"""Largest k of the call that filters logits."""


def causal_mask(device: str) -> Tensor:
    """int8 [2048, 2048]: 1 where a key is behind the query."""
    return torch.ones(MASK, MASK, dtype=torch.int8).triu_(1).to(device)


def rotary_mul(q: Tensor, k: Tensor, angles: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Rotate halves of every head, for head sizes that npu_mrope does not take; angles [T, D] are cos then sin."""
    cos, sin = (half.repeat(1, 2)[None, :, None] for half in angles.chunk(2, -1))
    rotated = (
        torch.ops.npu.npu_rotary_mul(
            x.view(1, -1, x.shape[1] // head_dim, head_dim), cos, sin, rotary_mode="half"
        )
        for x in (q, k)
    )
    q, k = (x.reshape(x.shape[1], -1) for x in rotated)
    return q, k


def cascade_attention(q: Tensor, kv: tuple[Tensor, Tensor], rows, scale: float, kv_heads: int) -> Tensor:
    """Decode rows q [T, H, D]: what a cohort shares for all of its rows, then each row's own, joined by the
    logarithms of the softmaxes' denominators."""
    some, how = rows.cohorts, {
        "num_heads": q.shape[1], "num_key_value_heads": kv_heads, "input_layout": "TND", "scale": scale,
        "block_size": rows.block_size, "sparse_mode": 0, "softmax_lse_flag": True,
    }  # fmt: skip
    keys, values = kv[0].flatten(2), kv[1].flatten(2)
    out, lse = torch.ops.npu.npu_fused_infer_attention_score(
        q, keys, values, block_table=some.own_table,
        actual_seq_lengths=rows.query_ends, actual_seq_lengths_kv=some.own_lengths, **how,
    )  # fmt: skip
    begin, more = torch.ops.npu.npu_fused_infer_attention_score(
        q.index_select(0, some.members), keys, values, block_table=some.table,
        actual_seq_lengths=some.ends, actual_seq_lengths_kv=some.common, **how,
    )  # fmt: skip
    joined, _ = torch.ops.npu.npu_attention_update(
        [lse.index_select(0, some.members).flatten(), more.flatten()],
        [out.index_select(0, some.members).flatten(0, 1), begin.flatten(0, 1)],
        0,
    )
    return out.index_copy(0, some.members, joined.view(begin.shape))


def top_k_top_p(logits: Tensor, how) -> Tensor:
    """Both filters in one call where every row that draws keeps 1 to 1024 tokens, else in stock torch: `how` has the
    least and most as host integers, so nothing is read back. Of greedy rows the likeliest token stays, whatever k.

    The call subtracts from 1 in float32, which may round otherwise at an exact tie.
    """
    least, most = how.top_k_span
    if not 1 <= least <= most <= min(MOST_KEPT, logits.shape[1]):
        return sampling.top_p(sampling.top_k(logits, how.top_k), how.top_p)
    k = how.top_k.clamp(1, most).to(torch.int32)
    return torch.ops.npu.npu_top_k_top_p(logits, how.top_p.to(logits.dtype), k)


def tree_attention(
    q: Tensor, kv: tuple[Tensor, Tensor], rows, scale: float, window: int | None = None
) -> Tensor:
    """Trees of guesses in stock torch: their masks fit none of the compressed modes."""
    return aten.tree_attention(q, kv, rows.aten, scale, window)


class Unfolded:
    """A cache in NZ, [blocks, N * D / 16, block size, 16], as kernels in stock torch ask for one."""

    def __init__(self, cache: Tensor, kv_heads: int):
        blocks, groups, size, part = cache.shape
        self._cache, self.shape = cache, (blocks, size, kv_heads, groups * part // kv_heads)

    def index_select(self, dim: int, blocks: Tensor) -> Tensor:
        """[blocks, block size, N, D]"""
        return self._cache.index_select(dim, blocks).transpose(1, 2).reshape(-1, *self.shape[1:])


def unfolded(kv: tuple[Tensor, Tensor], kv_heads: int) -> tuple[Unfolded, Unfolded]:
    return Unfolded(kv[0], kv_heads), Unfolded(kv[1], kv_heads)
