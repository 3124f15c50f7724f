"""Fewer, larger kernels, as far as the backend has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from xdsl.ir import Operation

from sagellm.ir.attrs import dtype_name, last_dim, shape_of, tensor
from sagellm.ir.build import created, properties
from sagellm.ir.check import weight_names
from sagellm.ir.dialects import comm, nn, weights
from sagellm.ir.edit import (
    erase,
    insert_after,
    insert_before,
    maker,
    only_block,
    operations,
    parent_function,
    precedes,
    replace,
    symbol_name,
    users,
)
from sagellm.ir.graph import IRGraph
from sagellm.passes.driver import Pass, PassContext, rewrites


@dataclass(frozen=True)
class KernelFusion(Pass):
    """Merges linears that read one input (q/k/v, gate/up), add + rms_norm, silu * up, rope + KV write, with the
    norms of q and k where there are some, (add +) rms_norm + quantize, a product and its sum over the ranks, and the
    top-k and top-p filters.

    Merged linears become one matrix product; the weights program joins their matrices at load time.
    Declines where the backend has no kernel for the fused operation, where only some of the linears have a bias,
    where a weight is used a second time, for silu * up when the two are not halves of one product, for the KV
    write where rotated keys are read by something else, for a norm that is also read as it is, and for a product with
    a bias or a packed matrix, or that is read before it is summed. Whether a fused sum stays so, or runs beside other
    work, is for comm-compute-overlap to predict.
    """

    name: ClassVar[str] = "kernel-fusion"
    graph: ClassVar[Literal["model"]] = "model"

    @rewrites(nn.Linear)
    def merge_linears(self, op: nn.Linear, graph: IRGraph, context: PassContext) -> None:
        group = [user for user in users(op.x) if isinstance(user, nn.Linear)]
        if len(group) < 2 or group[0] is not op:
            return
        names = [linear.weight.root_reference.data for linear in group]
        what = " + ".join(f"@{name}" for name in names)
        if "nn.split" not in context.capability.kernels:
            self.declined(context, op, f"{what}: {context.capability.backend} has no nn.split")
            return
        if len({linear.bias is None for linear in group}) != 1:
            self.declined(context, op, f"{what}: some have a bias and some have none")
            return
        function = parent_function(op)
        load = graph.loads.get(symbol_name(function))
        if load is None:
            self.declined(
                context, op, f"{what}: the module has no weights program for @{symbol_name(function)}"
            )
            return
        stores = _stores(load)
        biases = [linear.bias.root_reference.data for linear in group if linear.bias is not None]
        parts = [names, biases] if biases else [names]
        if reason := self._unmergeable(function, stores, parts):
            self.declined(context, op, f"{what}: {reason}")
            return
        merged = [_join(stores, part) for part in parts]
        sizes = [last_dim(linear.result.type) for linear in group]
        dtype = dtype_name(op.result.type)
        product = nn.Linear.create(
            operands=[op.x],
            result_types=[tensor(dtype, None, sum(sizes))],
            properties=properties({"weight": merged[0], "bias": merged[1] if len(merged) > 1 else None}),
        )
        split = nn.Split.create(
            operands=[product.results[0]],
            result_types=[linear.result.type for linear in group],
            properties=properties({"sizes": sizes}),
        )
        insert_before(op, created(product), split)
        self.applied(
            context, op, f"{what} -> @{merged[0]}: one product of {sum(sizes)} columns for {len(group)}"
        )
        for linear, value in zip(group, split.results):
            replace(linear, [value])

    def _unmergeable(self, function: Operation, stores: dict, parts: list[list[str]]) -> str | None:
        used: dict[str, int] = {}
        for other in operations(only_block(function)):
            for name in weight_names(other):
                used[name] = used.get(name, 0) + 1
        for name in (name for part in parts for name in part):
            if used[name] > 1:
                return f"@{name} is used {used[name]} times"
            if name not in stores:
                return f"the weights program does not store @{name}"
            if not isinstance(maker(stores[name].x), weights.Tensor):
                return f"@{name} is computed, not a tensor of the checkpoint"
        return None

    @rewrites(nn.RmsNorm)
    def add_rms_norm(self, op: nn.RmsNorm, graph: IRGraph, context: PassContext) -> None:
        add = maker(op.x)
        if not isinstance(add, nn.Add) or op.heads is not None:
            return
        if "nn.add_rms_norm" not in context.capability.kernels:
            self.declined(context, op, f"{context.capability.backend} has no nn.add_rms_norm")
            return
        fused = nn.AddRmsNorm.create(
            operands=[add.x, add.y],
            result_types=[add.result.type, op.result.type],
            properties={"weight": op.weight, "eps": op.eps},
        )
        insert_before(add, fused)
        self.applied(context, op, "add + rms_norm -> add_rms_norm")
        replace(op, [fused.normed])
        replace(add, [fused.total])

    @rewrites(nn.Quantize)
    def norm_quantize(self, op: nn.Quantize, graph: IRGraph, context: PassContext) -> None:
        norm = maker(op.x)
        if isinstance(norm, nn.RmsNorm) and norm.heads is None:
            kind, before = nn.RmsNormQuantize, []
        elif isinstance(norm, nn.AddRmsNorm) and norm.normed is op.x:
            kind, before = nn.AddRmsNormQuantize, [norm.total]
        else:
            return
        if kind.name not in context.capability.kernels:
            self.declined(context, op, f"{context.capability.backend} has no {kind.name}")
            return
        if users(op.x) != [op]:
            self.declined(context, op, "the norm is also read as it is")
            return
        fused = kind.create(
            operands=norm.operands,
            result_types=[*(value.type for value in before), *op.result_types],
            properties={"weight": norm.weight, "eps": norm.eps},
        )
        insert_before(norm, fused)
        self.applied(
            context, op, f"{norm.name.removeprefix('nn.')} + quantize -> {kind.name.removeprefix('nn.')}"
        )
        replace(op, fused.results[len(before) :])
        for value, result in zip(before, fused.results):
            value.replace_all_uses_with(result)
            result.name_hint = value.name_hint
        erase(norm)

    @rewrites(comm.AllReduce)
    def linear_all_reduce(self, op: comm.AllReduce, graph: IRGraph, context: PassContext) -> None:
        linear = maker(op.x)
        if not isinstance(linear, nn.Linear):
            return
        what = f"@{linear.weight.root_reference.data}"
        if "comm.linear_all_reduce" not in context.capability.kernels:
            self.declined(context, op, f"{what}: {context.capability.backend} has no comm.linear_all_reduce")
            return
        if users(linear.result) != [op]:
            self.declined(context, op, f"{what}: its product is read before it is summed")
            return
        if linear.bias is not None:
            self.declined(context, op, f"{what}: its product has a bias")
            return
        if linear.layout is not None:
            self.declined(context, op, f"{what} is packed as {linear.layout.data}")
            return
        fused = comm.LinearAllReduce.create(
            operands=[linear.x],
            result_types=[op.result.type],
            properties={"weight": linear.weight, "group": op.group},
        )
        insert_before(op, fused)
        self.applied(context, op, f"{what}: linear + all_reduce -> linear_all_reduce")
        replace(op, [fused.result])
        erase(linear)

    @rewrites(nn.TopP)
    def top_k_top_p(self, op: nn.TopP, graph: IRGraph, context: PassContext) -> None:
        top_k = maker(op.logits)
        if not isinstance(top_k, nn.TopK) or top_k.how is not op.how or users(top_k.result) != [op]:
            return
        if "nn.top_k_top_p" not in context.capability.kernels:
            self.declined(context, op, f"{context.capability.backend} has no nn.top_k_top_p")
            return
        fused = nn.TopKTopP.create(operands=top_k.operands, result_types=[op.result.type])
        insert_before(op, created(fused))
        self.applied(context, op, "top_k + top_p -> top_k_top_p")
        replace(op, [fused.result])
        erase(top_k)

    @rewrites(nn.KvWrite)
    def rope_kv_write(self, op: nn.KvWrite, graph: IRGraph, context: PassContext) -> None:
        rope = maker(op.k)
        if not isinstance(rope, nn.Rope) or rope.k_out is not op.k or rope.head_dim != op.head_dim:
            return
        if "nn.rope_kv_write" not in context.capability.kernels:
            self.declined(context, op, f"{context.capability.backend} has no nn.rope_kv_write")
            return
        if users(rope.k_out) != [op] or not all(precedes(op, user) for user in users(rope.q_out)):
            self.declined(context, op, "what is rotated is read before it is written")
            return
        norms = _head_norms(rope)
        given = (
            {}
            if norms is None
            else {"q_norm": norms[0].weight, "k_norm": norms[1].weight, "eps": norms[0].eps}
        )
        q, k = (rope.q, rope.k) if norms is None else (norms[0].x, norms[1].x)
        fused = nn.RopeKvWrite.create(
            operands=[q, k, op.v, rope.angles, op.rows],
            result_types=[rope.q_out.type],
            properties={"head_dim": op.head_dim, **given, **properties({"kv_dtype": op.kv_dtype})},
        )
        parts = ["rope", "kv_write"] if norms is None else ["q and k norm", "rope", "kv_write"]
        self.applied(context, op, f"{' + '.join(parts)} -> rope_kv_write")
        insert_before(op, created(fused))
        rope.q_out.replace_all_uses_with(fused.q_out)
        for done in (op, rope, *(norms or ())):
            erase(done)

    @rewrites(nn.Mul)
    def silu_mul(self, op: nn.Mul, graph: IRGraph, context: PassContext) -> None:
        silu = maker(op.x)
        if not isinstance(silu, nn.Silu) or len(users(silu.result)) != 1:
            return
        if "nn.silu_mul" not in context.capability.kernels:
            self.declined(context, op, f"{context.capability.backend} has no nn.silu_mul")
            return
        split = maker(silu.x)
        if not isinstance(split, nn.Split) or tuple(split.results) != (silu.x, op.y):
            self.declined(context, op, "gate and up are not the halves of one product")
            return
        fused = nn.SiluMul.create(operands=[split.x], result_types=[op.result.type])
        insert_before(op, created(fused))
        self.applied(context, op, "split + silu + mul -> silu_mul")
        replace(op, [fused.result])
        erase(silu)
        if not any(users(result) for result in split.results):
            erase(split)


def _head_norms(rope: nn.Rope) -> tuple[nn.RmsNorm, nn.RmsNorm] | None:
    """The norms of q's and k's heads that only this rotation reads, where one kernel can do both."""
    q, k = maker(rope.q), maker(rope.k)
    if not isinstance(q, nn.RmsNorm) or not isinstance(k, nn.RmsNorm) or q.eps != k.eps:
        return None
    heads = [last_dim(norm.result.type) // rope.head_dim.value.data for norm in (q, k)]
    if [norm.heads and norm.heads.value.data for norm in (q, k)] != heads:
        return None
    return (q, k) if users(q.result) == users(k.result) == [rope] else None


def _stores(load: weights.Load) -> dict[str, weights.Store]:
    return {
        op.weight.root_reference.data: op
        for op in operations(only_block(load))
        if isinstance(op, weights.Store)
    }


def merged_name(names: list[str]) -> str:
    """q_proj, k_proj, v_proj -> qkv_proj; gate_proj, up_proj -> gate_up_proj."""
    stems, _, kind = zip(*(name.rpartition("_") for name in names))
    return f"{('' if all(len(stem) == 1 for stem in stems) else '_').join(stems)}_{kind[0]}"


def _join(stores: dict[str, weights.Store], names: list[str]) -> str:
    """Rewrite the weights program so that the tensors are stored as one; returns its name."""
    parts = [stores[name].x for name in names]
    rows = sum(shape_of(part.type)[0] for part in parts)
    dtype = dtype_name(parts[0].type)
    name = merged_name(names)
    concat = weights.Concat.create(
        operands=parts, result_types=[tensor(dtype, rows, *shape_of(parts[0].type)[1:])]
    )
    concat.result.name_hint = name
    store = weights.Store.create(operands=[concat.result], properties=properties({"weight": name}))
    makers = [made for made in map(maker, parts) if made is not None]
    last = next(op for op in makers if not any(precedes(op, other) for other in makers))
    insert_after(last, concat, store)
    for part in names:
        erase(stores[part])
    return name
