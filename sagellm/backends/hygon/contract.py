"""What the calls of lightop and of Hygon's flash_attn want and mean, by the places where others make them.

The numerics are flash-attention's and vLLM's. Where no source says whether a tensor may have gaps, it is kept
contiguous, and the rules hold us to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sagellm.backends import references
from sagellm.backends.contract import Call, Contract, Rule, contiguous, one_of, read_schemas, same_dtype
from sagellm.backends.hygon.codegen import HEAD, NORM

PLUGIN = "vllm-plugin-das"

# references


def rmsnorm_forward_autograd(x: Tensor, weight: Tensor, eps: float, training: bool) -> Tensor:
    return references.rms_norm(x, weight, eps)


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """In place: the sum to `residual`, its norm to `x`."""
    residual.add_(x)
    x.copy_(references.rms_norm(residual, weight, eps))


def silu_and_mul_opt(out: Tensor, input: Tensor) -> None:
    out.copy_(references.silu_mul(input))


def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, out: Tensor, **a) -> Tensor:
    """Queries [T, H, D] of sequence after sequence, over a cache [blocks, block size, heads, D]."""
    counts, lengths = torch.diff(a["cu_seqlens_q"]).tolist(), a["seqused_k"].tolist()
    keys, values = (references.pages(cache, a["block_table"], lengths) for cache in (k, v))
    scale = a["softmax_scale"]
    return out.copy_(references.attention(q, counts, keys, values, scale, a["window_size"][0]))


# rules


def _norm(a) -> str | None:
    width = a.x.shape[-1]
    if width < NORM or a.x.dim() != 2 or a.weight.shape != (width,):
        return (
            f"x {tuple(a.x.shape)}, weight {tuple(a.weight.shape)}; accepted: [rows, N] and [N], N >= {NORM}"
        )
    return None


def _two(a) -> str | None:
    if a.x.shape != a.residual.shape:
        return f"x {tuple(a.x.shape)} and residual {tuple(a.residual.shape)}; accepted: equal"
    return "x and residual are one tensor" if a.x.data_ptr() == a.residual.data_ptr() else None


def _halves(a) -> str | None:
    wide, narrow = tuple(a.input.shape), tuple(a.out.shape)
    expected = (*wide[:-1], wide[-1] // 2)
    return (
        None
        if narrow == expected
        else f"out {narrow}, input {wide}; accepted: out {expected}, before the input"
    )


def _cache(a) -> str | None:
    heads, dim = a.q.shape[-2:]
    if a.q.dim() != 3 or a.out is None or a.out.shape != a.q.shape:
        return f"queries {tuple(a.q.shape)}; accepted: [tokens, heads, D] and out alike"
    if dim % 8 or dim > HEAD:
        return f"head size {dim}; accepted: multiples of 8 up to {HEAD}"
    if a.k.shape != a.v.shape or a.k.dim() != 4 or a.k.shape[3] != dim or heads % a.k.shape[2]:
        return (
            f"cache {tuple(a.k.shape)} for {heads} heads of {dim}; accepted: [blocks, block size, heads, D]"
        )
    if a.k.shape[1] % 64:
        return f"blocks of {a.k.shape[1]} tokens; accepted: 64 (varlen), 128 (classic)"
    return None


def _lengths(a) -> str | None:
    offsets, used, table = a.cu_seqlens_q, a.seqused_k, a.block_table
    for name, tensor in (("cu_seqlens_q", offsets), ("seqused_k", used), ("block_table", table)):
        if tensor is None or tensor.dtype != torch.int32:
            return f"{name} is {None if tensor is None else tensor.dtype}; accepted: int32"
    counts = torch.diff(offsets)
    if int(offsets[0]) or int(offsets[-1]) != len(a.q) or int(counts.max()) > a.max_seqlen_q:
        return (
            f"cu_seqlens_q to {int(offsets[-1])} of {len(a.q)} queries; accepted: cumulative, from 0 to there"
        )
    if not len(counts) == len(used) == len(table):
        return f"{len(counts)} sequences, {len(used)} lengths and a table of {len(table)}; accepted: as many"
    if bool((counts > used).any()) or int(used.max()) > min(a.max_seqlen_k, table.shape[1] * a.k.shape[1]):
        return f"lengths up to {int(used.max())}; accepted: at least the queries, and what the table holds"
    if not 0 <= int(table.min()) <= int(table.max()) < len(a.k):
        return f"block {int(table.max())} of {len(a.k)}"
    return None


def _mask(a) -> str | None:
    left, right = a.window_size
    if not a.causal or ((left, right) != (-1, -1) and (left < 0 or right != 0)):
        return f"causal {a.causal}, window {a.window_size}; accepted here: True, (-1, -1) or (n, 0)"
    return None if a.softmax_scale is not None else "softmax_scale is left out; accepted: given"


SCHEMAS = read_schemas("sagellm.backends.hygon")


def _call(name: str, reference, *rules: Rule) -> Call:
    return Call(SCHEMAS[name], reference, "D", PLUGIN, rules)


CONTRACT = Contract(
    modules=("lightop.norm", "lightop.activation", "flash_attn"),
    calls=(
        _call(
            "lightop.norm.rmsnorm_forward_autograd", rmsnorm_forward_autograd,
            same_dtype("x", "weight"), contiguous("x"), one_of("training", (False,)), _norm,
        ),
        _call(
            "lightop.norm.fused_add_rms_norm", fused_add_rms_norm,
            same_dtype("x", "residual", "weight"), contiguous("x", "residual"), _norm, _two,
        ),
        _call(
            "lightop.activation.silu_and_mul_opt", silu_and_mul_opt,
            same_dtype("out", "input"), contiguous("out", "input"), _halves,
        ),
        _call(
            "flash_attn.flash_attn_varlen_func", flash_attn_varlen_func,
            _cache, same_dtype("q", "k", "v", "out"), contiguous("q", "k", "v", "out"), _lengths, _mask,
        ),
    ),
)  # fmt: skip

STOCK_CONTRACT = Contract(calls=())
"""Of stock torch: numbers are compared, and there is nothing to bind."""
