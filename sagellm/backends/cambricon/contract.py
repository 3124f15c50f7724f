"""What torch_mlu_ops' calls want and mean. Signatures are those of release 1.12.1.

A window counts the keys before the query's own, -1 is none. Where no source says whether a tensor may have gaps, it
is kept contiguous, and the rules hold us to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sagellm.backends import references
from sagellm.backends.cambricon.codegen import GROUP, HEAD_SIZES
from sagellm.backends.contract import Call, Contract, Rule, contiguous, one_of, read_schemas, same_dtype

DOCS, PLUGIN = "torch_mlu_ops docstrings", "torch_mlu_ops docstrings and vllm-mlu"

# references


def fused_rms_norm(x: Tensor, residual: Tensor | None, gamma: Tensor, eps: float, **a):
    """The norm; with `store_output_before_norm`, and what was normed."""
    total = x if residual is None else x + residual
    normed = references.rms_norm(total, gamma, eps)
    return (normed, total) if a["store_output_before_norm"] else normed


def apply_rotary(input: Tensor, sin_cache: Tensor, cos_cache: Tensor, interleaved: bool, **a) -> Tensor:
    """In place where there is no output; row t of the tables is of the sequence's token t."""
    count, width = input.shape[-3], sin_cache.shape[-1]
    sin, cos = (cache[:count, None].float() for cache in (sin_cache, cos_cache))
    out = input if a["output"] is None else a["output"]
    x = input[..., :width].float()
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    else:
        low, high = x.chunk(2, -1)
        turned = torch.cat([-high, low], -1)
    out[..., :width] = (x * cos + turned * sin).to(out.dtype)
    return out


def active(input: Tensor, **a) -> Tensor:
    return references.silu_mul(input)


def reshape_paged_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, **a):
    """A negative slot is left out."""
    kept = slot_mapping >= 0
    slots, size = slot_mapping[kept].long(), k_cache.shape[2]
    for x, cache in ((k, k_cache), (v, v_cache)):
        cache[slots // size, :, slots % size] = x[kept]
    return k_cache, v_cache


def flash_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, **a) -> Tensor:
    """Queries [T, H, D] of sequence after sequence, over a cache [blocks, heads, block size, D]."""
    counts, lengths = (torch.diff(a[name]).tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_kv"))
    keys, values = (references.pages(c.transpose(1, 2), a["block_tables"], lengths) for c in (k, v))
    return out.copy_(references.attention(q, counts, keys, values, a["softmax_scale"], a["window_size_left"]))


def single_query_cached_kv_attn(q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, **a) -> Tensor:
    """One query [B, 1, H, D] of each sequence."""
    lengths = a["context_lens"].tolist()
    keys, values = (
        references.pages(c.transpose(1, 2), a["block_tables"], lengths) for c in (k_cache, v_cache)
    )
    scale, left = a["softmax_scale"], a["windows_size_left"]
    return out.copy_(references.attention(q[:, 0], [1] * len(q), keys, values, scale, left)[:, None])


def matmul(a: Tensor, b: Tensor, bias: Tensor | None, trans_b: bool, **more) -> Tensor:
    product = a.float() @ (b.float().t() if trans_b else b.float())
    return (product if bias is None else product + bias.float()).to(a.dtype)


# rules


def _absent(*names: str) -> Rule:
    """That these arguments, which the references do not know, are not given."""

    def rule(a) -> str | None:
        return next((f"{n} is given; accepted here: None" for n in names if getattr(a, n) is not None), None)

    return rule


def _norm(a) -> str | None:
    if a.gamma.shape != a.x.shape[-1:]:
        return f"gamma {tuple(a.gamma.shape)} over rows of {a.x.shape[-1]}"
    if a.residual is None:
        return "no residual to store before the norm" if a.store_output_before_norm else None
    if a.residual.shape != a.x.shape or a.residual.dtype != a.x.dtype or not a.residual.is_contiguous():
        return f"residual {tuple(a.residual.shape)} of {a.residual.dtype}; accepted: as x {tuple(a.x.shape)}"
    return None if a.store_output_before_norm else "store_output_before_norm is False with a residual"


def _rotary(a) -> str | None:
    shape, sin, cos = a.input.shape, a.sin_cache, a.cos_cache
    width = sin.shape[-1]
    if len(shape) != 4 or shape[0] > 10240:
        return f"input {tuple(shape)}; accepted here: [batch up to 10240, tokens, heads, D]"
    if width % 2 or not 2 <= width <= min(256, shape[-1]) or sin.shape != cos.shape:
        return f"sin {tuple(sin.shape)}, cos {tuple(cos.shape)}; accepted: an even width up to the head's {shape[-1]}"
    if shape[1] != a.max_seqlen or len(sin) < a.max_seqlen:
        return f"{shape[1]} tokens, tables of {len(sin)} and max_seqlen {a.max_seqlen}; accepted: max_seqlen tokens"
    if a.input.stride(-1) != 1 or a.discrete or a.dynamic_ntk:
        return "accepted here: a dense last dimension, discrete and dynamic_ntk False"
    same = torch.equal(cos[:, : width // 2], cos[:, width // 2 :])
    return None if same or a.interleaved else "tables of half the width; accepted: each half twice"


def _gated(a) -> str | None:
    width = a.input.shape[-1]
    return (
        None
        if a.is_gated and width % 2 == 0
        else f"is_gated {a.is_gated} over {width}; accepted here: True, even"
    )


def _cache(k: Tensor, v: Tensor, heads: int, dim: int, sizes: tuple[int, ...]) -> str | None:
    if k.shape != v.shape or k.dim() != 4 or k.shape[1] != heads or k.shape[3] != dim:
        return f"cache {tuple(k.shape)} for {heads} heads of {dim}; accepted: [blocks, heads, block size, D]"
    if k.shape[2] not in sizes or not k.is_contiguous():
        return f"blocks of {k.shape[2]} tokens; accepted: contiguous, of {', '.join(map(str, sizes))}"
    return None


def _write(a) -> str | None:
    slots, (_, heads, dim) = a.slot_mapping, a.k.shape
    if slots.dtype != torch.int32 or slots.shape != a.k.shape[:1]:
        return f"slot_mapping {tuple(slots.shape)} of {slots.dtype}; accepted: int32, one for each of {len(a.k)} keys"
    if said := _cache(a.k_cache, a.v_cache, heads, dim, (1, 16, 32, 64)):
        return said
    kept, end = slots[slots >= 0], len(a.k_cache) * a.k_cache.shape[2]
    if len(kept) and int(kept.max()) >= end:
        return f"slot {int(kept.max())} of {end}"
    return "two keys for one slot" if len(kept.unique()) < len(kept) else None


def _attention(q: Tensor, kv_heads: int, out: Tensor) -> str | None:
    heads, dim = q.shape[-2:]
    if heads % kv_heads or dim not in HEAD_SIZES or heads // kv_heads > GROUP:
        return f"{heads} heads of {dim} over {kv_heads}; accepted: {HEAD_SIZES}, at most {GROUP} for each"
    return None if out.shape == q.shape else f"out {tuple(out.shape)} for queries {tuple(q.shape)}"


def _table(table: Tensor, lengths: list[int], blocks: int, size: int, longest: int) -> str | None:
    if table.dtype != torch.int32 or len(table) != len(lengths):
        return f"block_tables {tuple(table.shape)} of {table.dtype}; accepted: int32, a row for each of {len(lengths)}"
    if table.numel() and not 0 <= int(table.min()) <= int(table.max()) < blocks:
        return f"block {int(table.max())} of {blocks}"
    if lengths and not 0 < min(lengths) <= max(lengths) <= min(longest, table.shape[1] * size):
        return (
            f"{max(lengths)} cached tokens in {table.shape[1]} blocks of {size}, at most {longest} promised"
        )
    return None


def _prompts(a) -> str | None:
    if a.q.dim() != 3 or a.block_tables is None:
        return f"queries {tuple(a.q.shape)}; accepted here: [tokens, heads, D] and block_tables"
    said = _attention(a.q, a.k.shape[1], a.out) or _cache(a.k, a.v, a.k.shape[1], a.q.shape[-1], (16,))
    if said:
        return said
    offsets, ends = a.cu_seq_lens_q, a.cu_seq_lens_kv
    if offsets.dtype != torch.int32 or ends.dtype != torch.int32 or offsets.shape != ends.shape:
        return "cu_seq_lens_q and cu_seq_lens_kv; accepted: int32 [sequences + 1]"
    counts, lengths = torch.diff(offsets).tolist(), torch.diff(ends).tolist()
    if int(offsets[0]) or int(ends[0]) or int(offsets[-1]) != len(a.q) or max(counts) > a.max_seq_len_q:
        return f"cu_seq_lens_q {offsets.tolist()[:4]}... of {len(a.q)} queries; accepted: from 0 to there"
    if not a.is_causal or any(count > length for count, length in zip(counts, lengths)):
        return (
            f"causal {a.is_causal}, queries {counts[:4]}..., keys {lengths[:4]}...; accepted: no fewer keys"
        )
    return _table(a.block_tables, lengths, len(a.k), a.k.shape[2], a.max_seq_len_kv)


def _decodes(a) -> str | None:
    if a.q.dim() != 4 or a.q.shape[1] != 1:
        return f"queries {tuple(a.q.shape)}; accepted here: [sequences, 1, heads, D]"
    kv_heads = a.k_cache.shape[1]
    said = _attention(a.q, kv_heads, a.out) or _cache(
        a.k_cache, a.v_cache, kv_heads, a.q.shape[-1], (1, 16, 32, 64)
    )
    if said:
        return said
    if a.context_lens.dtype != torch.int32 or len(a.context_lens) != len(a.q):
        return f"context_lens of {a.context_lens.dtype}; accepted: int32, one for each of {len(a.q)}"
    size = a.k_cache.shape[2]
    return _table(a.block_tables, a.context_lens.tolist(), len(a.k_cache), size, a.max_context_len)


def _product(a) -> str | None:
    inner = a.b.shape[1 if a.trans_b else 0]
    if a.a.dim() != 2 or a.b.dim() != 2 or a.a.shape[1] != inner:
        return f"{tuple(a.a.shape)} times {tuple(a.b.shape)}, trans_b {a.trans_b}; accepted: a weight [N, K] as it is"
    return None


SCHEMAS = read_schemas("sagellm.backends.cambricon")


def _call(name: str, reference, source: str, *rules: Rule) -> Call:
    return Call(SCHEMAS[f"torch_mlu_ops.{name}"], reference, "C", source, rules)


CONTRACT = Contract(
    modules=("torch_mlu", "torch_mlu_ops"),
    calls=(
        _call(
            "fused_rms_norm", fused_rms_norm, DOCS,
            _absent("beta", "bias", "quant_scale", "out"), same_dtype("x", "gamma"), contiguous("x"), _norm,
        ),
        _call(
            "apply_rotary", apply_rotary, PLUGIN,
            _absent("position_ids", "cu_seqlens"), same_dtype("input", "sin_cache", "cos_cache"),
            contiguous("sin_cache", "cos_cache"), _rotary,
        ),
        _call("active", active, DOCS, one_of("act_mode", ("silu",)), contiguous("input"), _gated),
        _call(
            "reshape_paged_cache", reshape_paged_cache, DOCS,
            same_dtype("k", "v", "k_cache", "v_cache"), contiguous("k", "v"),
            one_of("direction", (False,)), _write,
        ),
        _call(
            "flash_attention", flash_attention, PLUGIN,
            _absent("alibi_slope", "attn_bias", "sink"), same_dtype("q", "k", "v", "out"),
            contiguous("q", "out"), one_of("window_size_right", (-1,)), one_of("return_lse", (False,)), _prompts,
        ),
        _call(
            "single_query_cached_kv_attn", single_query_cached_kv_attn, PLUGIN,
            _absent("k_cache_quant_scale", "v_cache_quant_scale", "alibi_slopes", "mask", "sink"),
            same_dtype("q", "k_cache", "v_cache", "out"), contiguous("q", "out"),
            one_of("windows_size_right", (-1,)), one_of("return_lse", (False,)), _decodes,
        ),
        _call(
            "matmul", matmul, DOCS,
            _absent("c", "a_scale", "b_scale", "output"), same_dtype("a", "b"), contiguous("a", "b"),
            one_of("trans_a", (False,)), one_of("alpha", (1.0,)), one_of("beta", (0.0,)), _product,
        ),
    ),
)  # fmt: skip
