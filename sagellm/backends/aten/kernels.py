"""Kernels in stock torch, for any device that torch drives.

T tokens, H heads, G query heads a KV head, D head size, L cached tokens.

KV cache of a layer: (keys, values), each [blocks, block size, KV heads, D], or `Int8` of that shape. Numbers that led
here are in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention, silu

from sagellm.backends.aten.columns import AtenRows
from sagellm.backends.aten.int8 import Int8, int8, quantize  # noqa: F401 - emitted text calls `aten.int8`


def embedding_part(tokens: Tensor, table: Tensor, rank: int) -> Tensor:
    """[T] tokens to [T, N]; the table is the rank's part of the vocabulary, other tokens give zeros."""
    mine = tokens - rank * len(table)
    elsewhere = (mine < 0) | (mine >= len(table))
    return embedding(mine.masked_fill(elsewhere, 0), table).masked_fill_(elsewhere[:, None], 0)


def split_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first half of the rows, rounded up, and the rest."""
    half = (len(x) + 1) // 2
    return x[:half], x[half:]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., N] normalised over N; torch computes in float32 whatever the dtype."""
    return torch.rms_norm(x, weight.shape, weight, eps)


def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T, H * D], each head normalised over D."""
    return rms_norm(x.unflatten(-1, (-1, weight.shape[0])), weight, eps).flatten(-2)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, rms_norm(total, weight, eps)


def rms_norm_quantize(norm: Callable, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """By the kernel given, and `quantize`."""
    return quantize(norm(x, weight, eps))


def add_rms_norm_quantize(
    norm: Callable, x: Tensor, y: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernel given, and `quantize`."""
    total, normed = norm(x, y, weight, eps)
    return total, *quantize(normed)


def silu_mul(x: Tensor) -> Tensor:
    """[T, 2 N] -> [T, N]"""
    gate, up = x.chunk(2, -1)
    return silu(gate).mul_(up)


def rope(q: Tensor, k: Tensor, angles: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Rotate halves of every head; angles [T, D] are cos then sin."""
    cos, sin = angles.to(q.dtype).unsqueeze(1).chunk(2, -1)
    return _rotate(q, cos, sin, head_dim), _rotate(k, cos, sin, head_dim)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    heads = x.unflatten(-1, (-1, head_dim))
    low, high = heads.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).flatten(-2)


def kv_write(kv: tuple[Tensor, Tensor], k: Tensor, v: Tensor, rows) -> None:
    """Write [T, KV heads * D] to the rows' slots; tokens that several sequences share go to several slots."""
    if rows.kv_source is not None:
        k, v = k[rows.kv_source], v[rows.kv_source]
    for cache, x in zip(kv, (k, v)):
        if isinstance(cache, Int8):
            cache.write(rows.slots, x)
        else:
            cache.view(-1, x.shape[1]).index_copy_(0, rows.slots, x)


def rope_kv_write(
    kv: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Tensor,
    rows: AtenRows,
    head_dim: int,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Norms of the heads where there are some, rotation, and keys and values to the cache."""
    if norms is not None:
        q, k = head_norm(q, norms[0], norms[2]), head_norm(k, norms[1], norms[2])
    q, k = rope(q, k, angles, head_dim)
    kv_write(kv, k, v, rows)
    return q


def by_tokens(kv: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Views [blocks, block size, heads, D] of a cache [blocks, heads, block size, D], for kernels in stock torch."""
    return kv[0].transpose(1, 2), kv[1].transpose(1, 2)


def decode_attention(
    q: Tensor, kv: tuple[Tensor, Tensor], rows: AtenRows, scale: float, window: int | None = None
) -> Tensor:
    """One query a sequence, [D, H * head size]: the query heads of a KV head are rows of one product."""
    keys, values = kv
    kv_heads, head_dim = keys.shape[2], keys.shape[3]
    count, blocks = rows.decode_count, rows.decode_blocks.view(-1)
    q = q.view(count, kv_heads, -1, head_dim)
    k = keys.index_select(0, blocks).view(count, -1, kv_heads, head_dim).transpose(1, 2)
    v = values.index_select(0, blocks).view(count, -1, kv_heads, head_dim).transpose(1, 2)
    mask = None
    if count == 1:
        first = 0 if window is None else max(0, rows.longest - window)
        k, v = k[:, :, first : rows.longest], v[:, :, first : rows.longest]
    else:
        mask = rows.decode_mask(window, q.dtype)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).reshape(count, -1)


def cascade_attention(q: Tensor, kv: tuple[Tensor, Tensor], rows: AtenRows, scale: float) -> Tensor:
    """As `decode_attention`; what a cohort shares is one product for all of its rows (Juravsky et al. 2024)."""
    keys, values = kv
    kv_heads, head_dim = keys.shape[2], keys.shape[3]
    count = rows.decode_count
    blocks, mask = rows.own_blocks()
    q = q.view(count, kv_heads, -1, head_dim)
    k = keys.index_select(0, blocks).view(count, -1, kv_heads, head_dim).transpose(1, 2)
    v = values.index_select(0, blocks).view(count, -1, kv_heads, head_dim).transpose(1, 2)
    out, lse = _softmax_part(q, k, v, scale, mask)
    for members, shared in rows.cohorts:
        k = keys.index_select(0, shared).view(-1, kv_heads, head_dim).transpose(0, 1)
        v = values.index_select(0, shared).view(-1, kv_heads, head_dim).transpose(0, 1)
        queries = q[members].transpose(0, 1).reshape(kv_heads, -1, head_dim)
        begin, more = (
            x.view(kv_heads, len(members), -1, x.shape[-1]).transpose(0, 1)
            for x in _softmax_part(queries, k, v, scale)
        )
        share = torch.sigmoid(more - lse[members])
        out[members] = torch.lerp(out[members], begin, share)
    return out.to(q.dtype).reshape(count, -1)


def _softmax_part(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over a part of the keys, float32, and the log of its softmax's denominator [..., queries, 1]."""
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1, keepdim=True)
    return (scores - lse).exp_() @ v.float(), lse


def prefill_attention(
    q: Tensor, kv: tuple[Tensor, Tensor], rows: AtenRows, scale: float, window: int | None = None
) -> Tensor:
    """Many queries a sequence, [T, H * D], one product per sequence over its own blocks."""
    keys, values = kv
    kv_heads, head_dim = keys.shape[2], keys.shape[3]
    out = torch.empty_like(q)
    base = rows.decode_count
    for first, end, length, blocks, causal in rows.prefills:
        some = q[first - base : end - base].view(end - first, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        group = some.shape[1]
        k = keys.index_select(0, blocks).view(-1, kv_heads, head_dim)[:length].transpose(0, 1)
        v = values.index_select(0, blocks).view(-1, kv_heads, head_dim)[:length].transpose(0, 1)
        k = k.unsqueeze(1).expand(-1, group, -1, -1)
        v = v.unsqueeze(1).expand(-1, group, -1, -1)
        whole = causal and (window is None or window >= length)
        mask = None if whole else _window_mask(end - first, length, window, q.device)
        done = scaled_dot_product_attention(some, k, v, attn_mask=mask, is_causal=whole, scale=scale)
        out[first - base : end - base] = done.permute(2, 0, 1, 3).reshape(end - first, -1)
    return out


def mixed_attention(
    decoding: Callable,
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    rows: AtenRows,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Decodes first on the token axis, by the kernel given, then prefills."""
    count, more = rows.decode_count, {} if window is None else {"window": window}
    return torch.cat([
        decoding(q[:count], kv, rows, scale, **more),
        prefill_attention(q[count:], kv, rows, scale, window),
    ])  # fmt: skip


def tree_attention(
    q: Tensor, kv: tuple[Tensor, Tensor], rows, scale: float, window: int | None = None
) -> Tensor:
    """Decodes without guesses first, then trees of guesses [T, H * D]: one product, as wide as the widest tree."""
    keys, values = kv
    kv_heads, head_dim = keys.shape[2], keys.shape[3]
    nodes = rows.tree_nodes
    trees, widest = nodes.shape
    some = q[nodes].view(trees, widest, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k = keys.index_select(0, rows.tree_blocks).view(trees, -1, kv_heads, head_dim).transpose(1, 2)
    v = values.index_select(0, rows.tree_blocks).view(trees, -1, kv_heads, head_dim).transpose(1, 2)
    mask = rows.tree_mask(window, q.dtype).repeat(1, 1, some.shape[2] // widest, 1)
    done = scaled_dot_product_attention(some, k, v, attn_mask=mask, scale=scale)
    done = done.unflatten(2, (-1, widest)).permute(0, 3, 1, 2, 4).reshape(trees * widest, -1)
    done = done.index_select(0, rows.tree_places)
    count = rows.decode_count
    return done if count == 0 else torch.cat([decode_attention(q[:count], kv, rows, scale, window), done])


def _window_mask(queries: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, length], true where the key is visible: the last query sees the last key."""
    at = torch.arange(length - queries, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    visible = key <= at
    return visible if window is None else visible & (key > at - window)


def pool(x: Tensor, rows, kind: str) -> Tensor:
    """[P, H] float32 of hidden states [T, H]: of each sequence the mean, the last or the first."""
    parts = [x[first:end].float() for first, end, *_ in rows.prefills]
    return torch.stack(
        [part.mean(0) if kind == "mean" else part[-1 if kind == "last" else 0] for part in parts]
    )
