"""What torch_npu's calls want and mean. Schemas are as torch_npu 2.13.0 registers them."""

from __future__ import annotations

import torch
from torch import Tensor

from sagellm.backends.contract import Call, Contract, Rule, contiguous, one_of, read_schemas, same_dtype
from sagellm.backends.references import GROUPS

DOCS = "op-plugin docs"
HALVES = (torch.bfloat16, torch.float16)
WIDE = (*HALVES, torch.float32)


# references


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    x = input.float()
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return (x * rstd * gamma.float()).to(input.dtype), rstd


def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x1 + x2
    return *rms_norm(total, gamma, epsilon), total


def dynamic_quant(
    input: Tensor, smooth_scales, group_index, dst_type, quant_mode: str, dst_type_max: float
) -> tuple[Tensor, Tensor]:
    """int8, a scale for each row, without smoothing; a row of zeros stays one."""
    wide = input.float()
    scale = wide.abs().amax(-1) / 127
    return torch.where(scale[..., None] > 0, wide / scale[..., None], 0).round().to(torch.int8), scale


def add_rms_norm_dynamic_quant(
    x1: Tensor, x2: Tensor, gamma: Tensor, smooth_scale1, smooth_scale2, beta, epsilon: float, output_mask, y_dtype
) -> tuple[Tensor, ...]:  # fmt: skip
    """Quantised once; what is masked out is empty here."""
    total = x1 + x2
    normed = rms_norm(total.float(), gamma, epsilon)[0]
    values, scale = dynamic_quant(normed, None, None, None, "pertoken", 0.0)
    return values, values.new_empty(0), total, scale, scale.new_empty(0)


def mm_all_reduce_base(x1: Tensor, x2: Tensor, hcom: str, **_) -> Tensor:
    """Summed over the ranks of a group that is checked here; a group of one rank is not among them."""
    product = (x1.float() @ x2.float()).to(x1.dtype)
    return GROUPS[hcom](product) if hcom in GROUPS else product


def swiglu(input: Tensor, dim: int) -> Tensor:
    first, second = input.float().chunk(2, dim)
    return (torch.nn.functional.silu(first) * second).to(input.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Halves of the last dimension; cos and sin of a half."""
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def mrope(
    positions: Tensor, query: Tensor, key: Tensor, cos_sin_cache: Tensor, head_size: int,
    mrope_section, rotary_mode: str, cache_mode: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain rotation, as with sections of 0; in float32."""
    cos, sin = cos_sin_cache[positions].float()[:, None].chunk(2, -1)
    width = cos_sin_cache.shape[1]

    def turned(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, head_size))
        part = heads[..., :width]
        if rotary_mode == "interleaved":
            part = part.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        part = _rotate(part, cos, sin)
        if rotary_mode == "interleaved":
            part = part.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return torch.cat([part.to(x.dtype), heads[..., width:]], -1).flatten(-2)

    return turned(query), turned(key)


def rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, rotate) -> Tensor:
    if rotary_mode == "interleave":
        pairs = input.unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
    else:
        low, high = input.chunk(2, -1)
        turned = torch.cat([-high, low], -1)
    return (input.float() * r1.float() + turned.float() * r2.float()).to(input.dtype)


def scatter_pa_kv_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor,
    compress_lens, compress_seq_offsets, seq_lens, cache_mode: str,
) -> None:  # fmt: skip
    """Only the mode `Norm`, [blocks, block size, heads, D]."""
    for x, cache in ((key, key_cache), (value, value_cache)):
        cache.flatten(0, 1)[slot_mapping.long()] = x


def reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor
) -> None:
    """To a cache in NZ, [blocks, heads * D / 16, block size, 16]."""
    size, part = key_cache.shape[2:]
    block, at = slot_indices.long() // size, slot_indices.long() % size
    for x, cache in ((key, key_cache), (value, value_cache)):
        cache[block, :, at] = x.flatten(1).unflatten(1, (-1, part))


def attention_score(query: Tensor, key: Tensor, value: Tensor, **a) -> tuple[Tensor, Tensor]:
    """TND over a paged cache [blocks, block size, kv heads * D]; each sequence by itself, in float32."""
    heads, dim = query.shape[1:]
    kv_heads, mode = a["num_key_value_heads"] or heads, a["sparse_mode"]
    out, lse = torch.empty_like(query), query.new_empty(len(query), heads, 1, dtype=torch.float32)
    first = 0
    for i, (end, length) in enumerate(zip(a["actual_seq_lengths"], a["actual_seq_lengths_kv"])):
        blocks = a["block_table"][i, : -(-length // a["block_size"])].long()
        k, v = (
            x[blocks].flatten(0, 1)[:length].unflatten(-1, (kv_heads, dim)).float().transpose(0, 1)
            for x in (key, value)
        )
        q = query[first:end].float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
        scores = q @ k[:, None].transpose(-1, -2) * a["scale"]
        at = torch.arange(length - (end - first), length)[:, None]
        keys = torch.arange(length)
        if mode == 2:
            hidden = keys > at - at[:1]
        elif mode == 3:
            hidden = keys > at
        elif mode == 4:
            hidden = (keys > at + a["next_tokens"]) | (keys < at - a["pre_tokens"])
        else:
            hidden = torch.zeros(end - first, length, dtype=torch.bool)
        scores = scores.masked_fill(hidden, float("-inf"))
        some = scores.logsumexp(-1, keepdim=True)
        done = (scores - some).exp() @ v[:, None]
        out[first:end] = done.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
        lse[first:end] = some.permute(2, 0, 1, 3).flatten(1, 2)
        first = end
    return out, lse if a["softmax_lse_flag"] else lse.new_empty(0)


def attention_update(lse: list[Tensor], local_out: list[Tensor], update_type: int) -> tuple[Tensor, Tensor]:
    parts = torch.stack(lse)
    total = parts.logsumexp(0)
    shares = (parts - total).exp()[..., None]
    joined = (torch.stack(local_out).float() * shares).sum(0).to(local_out[0].dtype)
    return joined, total if update_type else total.new_empty(0)


def top_k_top_p(logits: Tensor, p: Tensor | None, k: Tensor | None) -> Tensor:
    """What is left out is -inf: what is below the k-th largest, then the least likely whose sum stays within 1 - p."""
    values, order = logits.sort(dim=-1, stable=True)
    if k is not None:
        least = values.gather(1, values.shape[1] - k.long()[:, None])
        values = values.masked_fill(values < least, float("-inf"))
    if p is not None:
        surplus = values.float().softmax(-1).cumsum(-1) <= 1 - p.float()[:, None]
        surplus[:, -1] = False
        values = values.masked_fill(surplus, float("-inf"))
    return torch.empty_like(logits).scatter_(1, order, values)


# rules: what CANN refuses on the chip although the host code lets it pass


def gamma_fits(x: str) -> Rule:
    def rule(a) -> str | None:
        width = getattr(a, x).shape[-1]
        return None if a.gamma.shape == (width,) else f"gamma {tuple(a.gamma.shape)} over rows of {width}"

    return rule


def _per_token(a) -> str | None:
    if a.quant_mode != "pertoken" or {a.smooth_scales, a.group_index, a.dst_type} != {None}:
        return "accepted here: int8 by token, without smoothing"
    return None if a.input.dim() > 1 else f"input {tuple(a.input.shape)}; accepted: two dimensions or more"


def _quantised_once(a) -> str | None:
    if {a.smooth_scale1, a.smooth_scale2, a.beta, a.y_dtype} != {None}:
        return "accepted here: int8, without smoothing and beta"
    if list(a.output_mask or ()) != [True, False]:
        return f"output_mask is {a.output_mask}; accepted: [True, False], as there is one smoothing at most"
    return None if a.x1.shape == a.x2.shape else f"{tuple(a.x1.shape)} and {tuple(a.x2.shape)} are added"


def _summed_product(a) -> str | None:
    if a.x1.dim() not in (2, 3) or a.x2.dim() != 2 or a.x1.shape[-1] != a.x2.shape[0]:
        return f"{tuple(a.x1.shape)} @ {tuple(a.x2.shape)}; accepted: [.., k] @ [k, n]"
    if not a.x1.numel() or not a.x2.numel() or a.x1.shape[-1] > 65535:
        return f"{tuple(a.x1.shape)} @ {tuple(a.x2.shape)}; accepted: nothing empty, k up to 65535"
    if not isinstance(a.hcom, str) or not a.hcom:
        return f"hcom is {a.hcom!r}; accepted: the group's name as HCCL gives it"
    return None if a.reduce_op == "sum" and a.comm_turn == 0 else "accepted: reduce_op sum, comm_turn 0"


def _even(a) -> str | None:
    size = a.input.shape[a.dim]
    return f"dimension {a.dim} of {size} has no halves" if size % 2 else None


def _mrope(a) -> str | None:
    step = 16 if a.query.dtype == torch.float32 else 32
    width = a.cos_sin_cache.shape[-1]
    if a.head_size % step or width % step:
        return (
            f"head size {a.head_size} and {width} rotated; accepted: multiples of {step} for {a.query.dtype}"
        )
    if a.query.dim() != 2 or a.query.shape[1] % a.head_size or a.key.shape[1] % a.head_size:
        return f"query {tuple(a.query.shape)}, key {tuple(a.key.shape)}; accepted: [tokens, heads * {a.head_size}]"
    if a.positions.shape != a.query.shape[:1] or a.positions.dtype not in (torch.int32, torch.int64):
        return f"positions {tuple(a.positions.shape)} of {a.positions.dtype}; accepted: one integer a token"
    if a.mrope_section not in (None, [0, 0, 0]):
        return f"mrope_section is {a.mrope_section}; accepted for one position a token: [0, 0, 0]"
    if len(a.positions) and int(a.positions.max()) >= len(a.cos_sin_cache):
        return f"position {int(a.positions.max())} of a table of {len(a.cos_sin_cache)}"
    return None


def _slots(name: str, size_dim: int) -> Rule:
    def rule(a) -> str | None:
        slots, cache = getattr(a, name), a.key_cache
        if slots.dtype not in (torch.int32, torch.int64) or slots.shape != a.key.shape[:1]:
            return f"{name} {tuple(slots.shape)} of {slots.dtype}; accepted: one integer for each of {len(a.key)} keys"
        if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < len(cache) * cache.shape[size_dim]:
            return f"{name} from {int(slots.min())} to {int(slots.max())} of {len(cache)} blocks"
        return f"{name} writes twice into one slot" if len(slots.unique()) < len(slots) else None

    return rule


def _norm_cache(a) -> str | None:
    expected = a.key_cache.shape[2:]
    if a.key_cache.dim() != 4 or a.key.shape[1:] != expected or a.value.shape != a.key.shape:
        return f"keys {tuple(a.key.shape)} into a cache {tuple(a.key_cache.shape)}; accepted: its heads and head size"
    return None


def _nz_cache(a) -> str | None:
    cache = a.key_cache
    if (
        cache.dim() != 4
        or cache.shape[3] != 16
        or cache.shape[1] * 16 != a.key[0].numel()
        or cache.shape[2] % 32
    ):
        return f"keys {tuple(a.key.shape)} into a cache {tuple(cache.shape)}; accepted: NZ, blocks of a multiple of 32"
    return None


def _attention_shapes(a) -> str | None:
    heads, kv_heads, dim = a.num_heads, a.num_key_value_heads, a.query.shape[-1]
    if a.input_layout != "TND":
        return f"input_layout is {a.input_layout!r}; accepted here: TND"
    if a.query.dim() != 3 or a.query.shape[1] != heads:
        return f"query {tuple(a.query.shape)} with num_heads {heads}; accepted: [tokens, heads, head size]"
    if not kv_heads or heads % kv_heads or heads // kv_heads > 64 or heads > 256:
        return f"{heads} heads over {kv_heads} of keys; accepted: a divisor given as num_key_value_heads, <= 64 times"
    if dim % 16 or dim > 512:
        return f"head size {dim}; accepted: multiples of 16 up to 512"
    if a.key.shape != a.value.shape or a.key.dim() != 3 or a.key.shape[2] != kv_heads * dim:
        return f"cache {tuple(a.key.shape)} for {kv_heads} heads of {dim}; accepted: [blocks, block size, heads * D]"
    if kv_heads * dim > 65535:
        return f"{kv_heads} * {dim} values a token; accepted: at most 65535 in this layout of the cache"
    if "scale" not in a.given:
        return "scale is left at 1.0; accepted: given"
    return None


def _attention_lengths(a) -> str | None:
    ends, lengths, table = a.actual_seq_lengths, a.actual_seq_lengths_kv, a.block_table
    if ends is None or lengths is None or table is None:
        return "paged TND wants block_table, actual_seq_lengths and actual_seq_lengths_kv"
    if not len(ends) == len(lengths) == len(table) or len(ends) > 4096:
        return f"{len(ends)} query ends, {len(lengths)} lengths and a table of {len(table)}; accepted: as many, <= 4096"
    if list(ends) != sorted(ends) or (ends and ends[-1] != len(a.query)):
        return (
            f"actual_seq_lengths {ends[:4]}... of {len(a.query)} tokens; accepted: cumulative, ending there"
        )
    if a.block_size != a.key.shape[1] or a.block_size % 16 or not 16 <= a.block_size <= 1024:
        return f"block_size {a.block_size} over blocks of {a.key.shape[1]}; accepted: a multiple of 16 up to 1024"
    if table.dtype != torch.int32 or (
        table.numel() and not 0 <= int(table.min()) <= int(table.max()) < len(a.key)
    ):
        return f"block_table of {table.dtype}; accepted: int32 numbers of the {len(a.key)} blocks"
    counts = [end - begin for begin, end in zip([0, *ends], ends)]
    for count, length in zip(counts, lengths):
        if not 0 < length <= table.shape[1] * a.block_size or (a.sparse_mode and count > length):
            return f"{count} queries over {length} cached tokens in {table.shape[1]} blocks of {a.block_size}"
    return None


def _attention_mask(a) -> str | None:
    if a.sparse_mode not in (0, 2, 3, 4):
        return f"sparse_mode is {a.sparse_mode}; accepted: 0, 2, 3, 4"
    if a.sparse_mode == 0:
        return None if a.atten_mask is None else "sparse_mode 0 with a mask; accepted here: none"
    mask = a.atten_mask
    if mask is None or mask.shape != (2048, 2048) or mask.dtype not in (torch.int8, torch.uint8, torch.bool):
        return "sparse_mode 2 to 4 wants a mask of int8 [2048, 2048]"
    if int(mask[0, 0]) or not int(mask[0, 1]):
        return "the mask is 1 where a key is hidden: behind the query"
    return None


def _update(a) -> str | None:
    shapes = [(tuple(one.shape), tuple(out.shape)) for one, out in zip(a.lse, a.local_out)]
    if len(a.lse) != len(a.local_out) or any(len(o) != 2 or o[:1] != one for one, o in shapes):
        return f"shapes {shapes}; accepted: [rows] and [rows, D] of each part"
    if any(o[1] % 8 or o[1] > 512 for _, o in shapes) or len(set(shapes)) > 1:
        return f"shapes {shapes}; accepted: equal, D a multiple of 8 up to 512"
    return None if a.update_type in (0, 1) else f"update_type is {a.update_type}; accepted: 0, 1"


def _filters(a) -> str | None:
    rows = a.logits.shape[:1]
    if a.p is None or a.k is None or a.p.shape != rows or a.k.shape != rows:
        return "p and k; accepted: one of each for every row of logits"
    if a.k.dtype != torch.int32 or a.p.dtype != a.logits.dtype:
        return f"p of {a.p.dtype} and k of {a.k.dtype}; accepted: p as the logits, k int32"
    least, most = int(a.k.min()), int(a.k.max())
    if not 1 <= least <= most <= min(1024, a.logits.shape[1]):
        return f"k from {least} to {most}; accepted: 1 to 1024, at most the vocabulary"
    return None


SCHEMAS = read_schemas("sagellm.backends.ascend")

CONTRACT = Contract(
    modules=("torch_npu",),
    host_code=True,
    calls=(
        Call(
            SCHEMAS["npu::npu_rms_norm"], rms_norm, "A", DOCS,
            (gamma_fits("input"), same_dtype("input", "gamma")), ("aclnnRmsNorm",),
        ),
        Call(
            SCHEMAS["npu::npu_add_rms_norm"], add_rms_norm, "A", DOCS,
            (gamma_fits("x1"), same_dtype("x1", "x2", "gamma")), ("aclnnAddRmsNorm",),
        ),
        Call(
            SCHEMAS["npu::npu_dynamic_quant"], dynamic_quant, "A", DOCS,
            (_per_token,), ("aclnnDynamicQuant", "aclnnDynamicQuantV2", "aclnnDynamicQuantV3"),
        ),
        Call(
            SCHEMAS["npu::npu_add_rms_norm_dynamic_quant"], add_rms_norm_dynamic_quant, "A", "ops-nn docs",
            (gamma_fits("x1"), same_dtype("x1", "x2", "gamma"), _quantised_once),
            ("aclnnAddRmsNormDynamicQuant", "aclnnAddRmsNormDynamicQuantV2"),
        ),
        Call(
            SCHEMAS["npu::npu_mm_all_reduce_base"], mm_all_reduce_base, "A", DOCS,
            (same_dtype("x1", "x2"), contiguous("x1"), _summed_product), ("aclnnMatmulAllReduce",),
        ),
        Call(SCHEMAS["npu::npu_swiglu"], swiglu, "A", DOCS, (_even,), ("aclnnSwiGlu",)),
        Call(
            SCHEMAS["npu::npu_mrope"], mrope, "A", DOCS,
            (
                same_dtype("query", "key", "cos_sin_cache"),
                one_of("rotary_mode", ("half", "interleaved")),
                one_of("cache_mode", ("default", "interleave")),
                _mrope,
            ),
            ("aclnnRopeWithSinCosCacheV2",),
        ),
        Call(
            SCHEMAS["npu::npu_rotary_mul"], rotary_mul, "A", DOCS,
            (same_dtype("input", "r1", "r2"), one_of("rotary_mode", ("half", "interleave"))),
            ("aclnnRotaryPositionEmbeddingV2", "aclnnMul"),
        ),
        Call(
            SCHEMAS["npu::npu_scatter_pa_kv_cache"], scatter_pa_kv_cache, "A", DOCS,
            (
                one_of("cache_mode", ("Norm",)),
                same_dtype("key", "value", "key_cache", "value_cache"),
                contiguous("key", "value", "key_cache", "value_cache"),
                _norm_cache,
                _slots("slot_mapping", 1),
            ),
            ("aclnnScatterPaKvCache",),
        ),
        Call(
            SCHEMAS["atb::_npu_reshape_and_cache"], reshape_and_cache, "A", "vllm-ascend",
            (
                same_dtype("key", "value", "key_cache", "value_cache"),
                contiguous("key", "value"),
                _nz_cache,
                _slots("slot_indices", 2),
            ),
            ("atb::ReshapeAndCache",),
            also=("torch_npu._npu_reshape_and_cache",),
        ),
        Call(
            SCHEMAS["npu::npu_fused_infer_attention_score"], attention_score, "A", DOCS,
            (
                same_dtype("query", "key", "value"),
                contiguous("query", "key", "value"),
                _attention_shapes, _attention_lengths, _attention_mask,
            ),
            ("aclnnFusedInferAttentionScoreV3", "aclnnFusedInferAttentionScoreV5"),
        ),
        Call(
            SCHEMAS["npu::npu_attention_update"], attention_update, "A", "ops-transformer docs",
            (_update,), ("aclnnAttentionUpdate",),
        ),
        Call(
            SCHEMAS["npu::npu_top_k_top_p"], top_k_top_p, "A", DOCS, (_filters,), ("aclnnApplyTopKTopP",),
        ),
    ),
)  # fmt: skip
