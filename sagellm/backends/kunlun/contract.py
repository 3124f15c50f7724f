"""What the calls of vLLM-Kunlun's operators and of kunlun_ops want and mean.

Attention and cache are known by the places where vLLM-Kunlun makes the calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sagellm.backends import references
from sagellm.backends.contract import Call, Contract, Rule, contiguous, one_of, read_schemas, same_dtype
from sagellm.backends.kunlun.codegen import HEAD_SIZES

PLUGIN = "vLLM-Kunlun"

STUBS = (
    "topk_softmax", "rms_norm", "fused_add_rms_norm", "static_scaled_fp8_quant", "dynamic_scaled_fp8_quant",
    "dynamic_per_token_scaled_fp8_quant", "rms_norm_static_fp8_quant", "rms_norm_per_block_quant",
    "fused_qk_norm_rope", "fused_add_rms_norm_static_fp8_quant", "rms_norm_dynamic_per_token_quant",
    "silu_and_mul_quant",
)  # fmt: skip
"""Operators that are registered with empty bodies: a call of them computes nothing."""


# references


def rmsnorm(x: Tensor, weight: Tensor, output: Tensor, eps: float, **a) -> None:
    output.copy_(references.rms_norm(x, weight, eps))


def add_rmsnorm(x: Tensor, y: Tensor, weight: Tensor, output: Tensor, eps: float, **a) -> None:
    """The sum to `residual_output`, its norm to `output`, which may be the inputs."""
    total = x + y
    a["residual_output"].copy_(total)
    output.copy_(references.rms_norm(total, weight, eps))


def rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool
) -> None:
    """In place; halves turn together."""
    cos, sin = cos_sin_cache[positions].float()[:, None].chunk(2, -1)
    width = cos_sin_cache.shape[1]
    for x in (query, key):
        part = x.view(len(x), -1, head_size)[..., :width]
        part.copy_(references.rotated(part, cos, sin))


def silu_and_mul(out: Tensor, x: Tensor, axis: int, turn: bool) -> None:
    out.copy_(references.silu_mul(x))


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    BLHD_LAYOUT: bool,
) -> None:
    """To a cache [blocks, heads, block size, D], or with BLHD_LAYOUT [blocks, block size, heads, D]."""
    size = key_cache.shape[1 if BLHD_LAYOUT else 2]
    block, at = slot_mapping // size, slot_mapping % size
    for x, cache in ((key, key_cache), (value, value_cache)):
        (cache if BLHD_LAYOUT else cache.transpose(1, 2))[block, at] = x


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, alpha: float, **a) -> None:
    """Over the cache; the kernel divides by the root of the head size, and multiplies by alpha."""
    counts, lengths = (torch.diff(a[f"context_{x}len_lod_xpu"]).tolist() for x in ("q", "kv"))
    keys, values = (references.pages(c.transpose(1, 2), a["block_table"], lengths) for c in (k, v))
    out.copy_(references.attention(q, counts, keys, values, alpha * q.shape[-1] ** -0.5))


def speculative_attention(out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, **a) -> None:
    """One query a sequence; the scale is the softmax's."""
    lengths = a["context_lens_xpu"].tolist()
    keys, values = (
        references.pages(c.transpose(1, 2), a["block_tables"], lengths) for c in (k_cache, v_cache)
    )
    queries = q.reshape(-1, a["head_num"], a["head_dim"])
    out.copy_(references.attention(queries, [1] * len(queries), keys, values, a["scale"]).view(out.shape))


def quant2d(x: Tensor, x_q: Tensor, max: Tensor, force_sdnn: bool) -> None:
    """A row's scale is its largest value, not a 127th of it."""
    max.copy_(x.float().abs().amax(-1, keepdim=True).view(max.shape))
    x_q.copy_((x.float() * 127 / max.view(-1, 1)).round())


def matmul(x: Tensor, w: Tensor, out_dtype: torch.dtype, w_trans: bool, **a) -> Tensor:
    """int8 rows of x times int8 rows of w; both scales are largest values."""
    product = x.float() @ (w.float().t() if w_trans else w.float())
    product = product * (a["x_pc_max"].view(-1, 1) / 127) * (a["w_pc_max"].view(1, -1) / 127)
    return (product if a["bias"] is None else product + a["bias"]).to(out_dtype)


# rules


def _norm(a) -> str | None:
    if a.weight.shape != a.x.shape[-1:] or a.output.shape != a.x.shape:
        return f"x {tuple(a.x.shape)}, weight {tuple(a.weight.shape)}, output {tuple(a.output.shape)}"
    return None


def _residual(a) -> str | None:
    if a.residual_output is None or a.y.shape != a.x.shape or a.residual_output.shape != a.x.shape:
        return "y and residual_output; accepted: as x"
    # Others have only called it so.
    apart = a.output.data_ptr() != a.x.data_ptr() or a.residual_output.data_ptr() != a.y.data_ptr()
    return "output and residual_output lie apart from x and y; accepted: in their place" if apart else None


def _rotary(a) -> str | None:
    if not a.is_neox or a.cos_sin_cache.shape[1] > a.head_size or a.cos_sin_cache.shape[1] % 2:
        return f"table {tuple(a.cos_sin_cache.shape)}, neox {a.is_neox}; accepted here: up to {a.head_size}, True"
    if a.positions.shape != a.query.shape[:1] or int(a.positions.max()) >= len(a.cos_sin_cache):
        return (
            f"positions {tuple(a.positions.shape)} for {len(a.query)} tokens and {len(a.cos_sin_cache)} rows"
        )
    return None


def _halves(a) -> str | None:
    expected = (*a.x.shape[:-1], a.x.shape[-1] // 2)
    if tuple(a.out.shape) != expected:
        return f"out {tuple(a.out.shape)}, x {tuple(a.x.shape)}; accepted: out {expected}, before x"
    return None


def _cache(k: Tensor, v: Tensor, kv_heads: int | None, dim: int) -> str | None:
    if k.shape != v.shape or k.dim() != 4 or k.shape[3] != dim or kv_heads not in (None, k.shape[1]):
        return (
            f"cache {tuple(k.shape)} for {kv_heads} heads of {dim}; accepted: [blocks, heads, block size, D]"
        )
    if k.shape[2] not in (16, 128) or not k.is_contiguous():
        return f"blocks of {k.shape[2]} tokens; accepted: contiguous, of 16 or 128"
    return None if dim in HEAD_SIZES else f"head size {dim}; accepted: {HEAD_SIZES}"


def _write(a) -> str | None:
    slots, (count, heads, dim) = a.slot_mapping, a.key.shape
    if a.BLHD_LAYOUT or a.key_cache.dim() != 4 or a.key_cache.shape[1::2] != (heads, dim):
        shape = f"[blocks, {heads}, block size, {dim}]"
        return f"cache {tuple(a.key_cache.shape)}; accepted here: {shape}, BLHD_LAYOUT False"
    if slots.dtype not in (torch.int32, torch.int64) or len(slots) != count:
        return f"slot_mapping {tuple(slots.shape)} of {slots.dtype}; accepted: an integer for each of {count} keys"
    end = len(a.key_cache) * a.key_cache.shape[2]
    if count and not 0 <= int(slots.min()) <= int(slots.max()) < end:
        return f"slots from {int(slots.min())} to {int(slots.max())} of {end}"
    return "two keys for one slot" if len(slots.unique()) < count else None


def _pair(host: Tensor, device: Tensor, what: str) -> str | None:
    if host is None or device is None or host.dtype != torch.int32 or device.dtype != torch.int32:
        return f"{what}; accepted: int32, on the host and on the device"
    return None if torch.equal(host, device.cpu()) else f"{what} differ between host and device"


def _prompts(a) -> str | None:
    if a.q.dim() != 3 or a.out.shape != a.q.shape or not (a.is_causal and a.is_prefix_cache):
        return f"queries {tuple(a.q.shape)}; accepted here: [tokens, heads, D], causal, over the cache"
    said = (
        _cache(a.k, a.v, None, a.q.shape[-1])
        or _pair(a.context_qlen_lod_cpu, a.context_qlen_lod_xpu, "context_qlen_lod")
        or _pair(a.context_kvlen_lod_cpu, a.context_kvlen_lod_xpu, "context_kvlen_lod")
    )
    if said or a.q.shape[1] % a.k.shape[1]:
        return said or f"{a.q.shape[1]} heads over {a.k.shape[1]}"
    offsets, ends = a.context_qlen_lod_cpu, a.context_kvlen_lod_cpu
    if offsets.shape != ends.shape or int(offsets[0]) or int(ends[0]) or int(offsets[-1]) != len(a.q):
        return (
            f"context_qlen_lod {offsets.tolist()[:4]}... of {len(a.q)} queries; accepted: cumulative, from 0"
        )
    counts, lengths = torch.diff(offsets), torch.diff(ends)
    if bool((counts > lengths).any()) or int(counts.min()) < 1:
        return (
            f"queries {counts.tolist()[:4]}... over keys {lengths.tolist()[:4]}...; accepted: no fewer keys"
        )
    return _table(a.block_table, lengths, a.k)


def _decodes(a) -> str | None:
    shape = (1, a.batch_num * a.qlen, a.head_num, a.head_dim)
    if a.qlen != 1 or tuple(a.q.shape) != shape or tuple(a.out.shape) != shape[1:]:
        return f"queries {tuple(a.q.shape)}, out {tuple(a.out.shape)}; accepted here: {shape} and {shape[1:]}, qlen 1"
    said = _cache(a.k_cache, a.v_cache, a.kv_head_num, a.head_dim) or _pair(
        a.context_lens_cpu, a.context_lens_xpu, "context_lens"
    )
    if said:
        return said
    if a.block_size != a.k_cache.shape[2] or a.max_num_blocks_per_seq != a.block_tables.shape[1]:
        return f"block_size {a.block_size}, {a.max_num_blocks_per_seq} blocks; accepted: as the cache and the table"
    longest = int(a.context_lens_cpu.max())
    if len(a.context_lens_cpu) != a.batch_num or longest > a.max_context_len:
        return f"{len(a.context_lens_cpu)} lengths up to {longest}; accepted: {a.batch_num}, to {a.max_context_len}"
    return _table(a.block_tables, a.context_lens_cpu, a.k_cache)


def _table(table: Tensor, lengths: Tensor, cache: Tensor) -> str | None:
    if table.dtype != torch.int32 or len(table) != len(lengths):
        return f"block table {tuple(table.shape)} of {table.dtype}; accepted: int32, {len(lengths)} rows"
    if not 0 <= int(table.min()) <= int(table.max()) < len(cache):
        return f"block {int(table.max())} of {len(cache)}"
    if not 0 < int(lengths.min()) <= int(lengths.max()) <= table.shape[1] * cache.shape[2]:
        return f"{int(lengths.max())} cached tokens in {table.shape[1]} blocks of {cache.shape[2]}"
    return None


def _quantised(a) -> str | None:
    if a.x_q.dtype != torch.int8 or a.x_q.shape != a.x.shape or a.max.dtype != torch.float32:
        return (
            f"x_q {tuple(a.x_q.shape)} of {a.x_q.dtype}, max of {a.max.dtype}; accepted: int8 as x, float32"
        )
    return None if a.max.numel() == len(a.x) else f"{a.max.numel()} scales for {len(a.x)} rows"


def _product(a) -> str | None:
    inner, outputs = a.w.shape[::-1] if a.w_trans else a.w.shape
    if a.x.shape[1] != inner:
        return f"{tuple(a.x.shape)} times {tuple(a.w.shape)}, w_trans {a.w_trans}; accepted: a weight [N, K] as it is"
    if (
        a.x_pc_max is None
        or a.w_pc_max is None
        or a.x_pc_max.numel() != len(a.x)
        or a.w_pc_max.numel() != outputs
    ):
        return f"x_pc_max and w_pc_max; accepted: one for each of {len(a.x)} rows and {outputs} columns"
    return (
        None
        if a.bias is None or a.bias.dtype == torch.float32
        else f"bias of {a.bias.dtype}; accepted: float32"
    )


SCHEMAS = read_schemas("sagellm.backends.kunlun")
UNLIMITED = (one_of("swa_left", (-1,)), one_of("swa_right", (-1,)))


def _call(name: str, reference, *rules: Rule) -> Call:
    return Call(SCHEMAS[name], reference, "C" if "::" in name else "D", PLUGIN, rules)


CONTRACT = Contract(
    modules=("torch_xmlir", "kunlun_ops", "vllm_kunlun.ops._custom_ops"),
    calls=(
        _call("_C::rmsnorm", rmsnorm, same_dtype("x", "weight", "output"), contiguous("x", "output"), _norm),
        _call(
            "_C::add_rmsnorm", add_rmsnorm,
            same_dtype("x", "y", "weight"), contiguous("x", "y"), _norm, _residual,
        ),
        _call(
            "_C::rotary_embedding", rotary_embedding,
            same_dtype("query", "key", "cos_sin_cache"), contiguous("query", "key", "cos_sin_cache"), _rotary,
        ),
        _call("_C::silu_and_mul", silu_and_mul, same_dtype("out", "x"), contiguous("out", "x"), _halves),
        _call(
            "kunlun_ops.reshape_and_cache_flash", reshape_and_cache_flash,
            same_dtype("key", "value", "key_cache", "value_cache"), contiguous("key", "value"), _write,
        ),
        _call(
            "kunlun_ops.prefill_attention", prefill_attention,
            same_dtype("q", "k", "v", "out"), contiguous("q", "out"), *UNLIMITED, _prompts,
        ),
        _call(
            "kunlun_ops.speculative_attention", speculative_attention,
            same_dtype("q", "k_cache", "v_cache", "out"), contiguous("q", "out"),
            one_of("max_window_size", (-1,)), _decodes,
        ),
        # What quantised weights will need; nothing emits them yet.
        _call("_C::quant2d", quant2d, contiguous("x"), _quantised),
        _call("_C::matmul", matmul, same_dtype("x", "w"), one_of("x_trans", (False,)), _product),
    ),
)  # fmt: skip

STOCK_CONTRACT = Contract(calls=(), modules=("torch_xmlir",))
"""Of stock torch: numbers are compared, and there is nothing to bind."""
