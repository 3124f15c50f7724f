"""Tensor parallelism: each rank holds a part of every matrix and computes with it; sums go around between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from xdsl.ir import Operation, SSAValue

from sagellm.errors import UserError
from sagellm.ir.attrs import FLAG, dtype_name, integer, last_dim, shape_of, tensor, word
from sagellm.ir.build import created, properties
from sagellm.ir.check import describe
from sagellm.ir.dialects import comm, nn, weights
from sagellm.ir.edit import insert_after, insert_before, maker, only_block, operations, retype, users
from sagellm.ir.graph import IRGraph
from sagellm.passes.driver import Pass, PassContext
from sagellm.schemas import DTYPE_BYTES

GROUP = "tp"
"""The group of all ranks of the engine."""


@dataclass(frozen=True)
class Shard(Pass):
    """Divides every matrix among the ranks, as Megatron-LM does (Shoeybi et al. 2019): q, k, v, gate and up by their
    outputs, so heads are divided; o and down by their inputs, so their products are summed over the ranks; embedding
    and output projection by the vocabulary. The weights program reads each rank's part alone; norms and rope tables are
    whole on every rank. With more ranks than KV heads, several ranks hold the same KV head.

    Declines where a product is read by an operation that wants all of it, and where there is no weights program.
    It stands before kernel-fusion and pack-weights, and is an error where a size cannot be divided.
    """

    ranks: int = 0
    """0: as many as the engine has."""

    name: ClassVar[str] = "shard"
    graph: ClassVar[Literal["model"]] = "model"

    def apply(self, graph: IRGraph, context: PassContext) -> None:
        ranks = self.ranks or context.ranks
        if ranks <= 1:
            return
        if graph.ranks > 1:
            self.declined(context, "the model", f"it is divided among {graph.ranks} ranks already")
            return
        whole = weight_bytes(graph)
        for name, function in graph.functions.items():
            load = graph.loads.get(name)
            if load is not None:
                _Function(self, context, load, ranks).rewrite(function)
            elif any(isinstance(op, (nn.Linear, nn.Embedding)) for op in operations(only_block(function))):
                self.declined(context, function, "it has no weights program")
        if graph.ranks > 1:
            part = weight_bytes(graph)
            self.applied(
                context,
                "the model",
                f"each of {ranks} ranks holds {part:,} of {whole:,} bytes of weights ({part / whole:.2%})",
            )


def weight_bytes(graph: IRGraph) -> int:
    """Bytes of the runtime weights that one rank holds."""
    total = 0.0
    for load in graph.loads.values():
        for op in operations(only_block(load)):
            if isinstance(op, weights.Store):
                size = DTYPE_BYTES[dtype_name(op.x.type)]
                total += load.count.value.data * math.prod(shape_of(op.x.type)) * size
    return int(total)


class _Function:
    """Rewrites one function; `parts` are the values of which a rank has one of so many parts of the last dimension."""

    def __init__(self, shard: Shard, context: PassContext, load: weights.Load, ranks: int):
        self.shard, self.context, self.ranks = shard, context, ranks
        self.stores = {
            op.weight.root_reference.data: op
            for op in operations(only_block(load))
            if isinstance(op, weights.Store)
        }
        self.parts: dict[SSAValue, int] = {}

    def rewrite(self, function: nn.Func) -> None:
        for op in list(operations(only_block(function))):
            match op:
                case nn.Embedding():
                    self._embedding(op)
                case nn.Linear() if op.x in self.parts:
                    self._by_inputs(op)
                case nn.Linear():
                    self._by_outputs(op)
                case nn.RmsNorm() if op.heads is not None and op.x in self.parts:
                    op.properties["heads"] = integer(op.heads.value.data // self.parts[op.x])
                    self._follow(op.x, op.result)
                case nn.Rope():
                    self._follow(op.q, op.q_out)
                    self._follow(op.k, op.k_out)
                case nn.Attention() if op.q in self.parts:
                    heads = op.kv_heads.value.data
                    op.properties["kv_heads"] = integer(heads // self._kv_parts(op, heads))
                    self._follow(op.q, op.result)
                case nn.Silu():
                    self._follow(op.x, op.result)
                case nn.Mul() if self.parts.get(op.x) == self.parts.get(op.y):
                    self._follow(op.x, op.result)
                case nn.KvWrite():
                    pass
                case _:
                    self._gather(op)

    def _embedding(self, op: nn.Embedding) -> None:
        name = op.weight.root_reference.data
        self._divides(op, shape_of(self.stores[name].x.type)[0], "rows of the vocabulary")
        self._cut(op, name, 0, self.ranks)
        op.properties["group"] = word(GROUP)
        self._sum(op, op.result)
        self.shard.applied(
            self.context, op, f"@{name}: the vocabulary is divided among {self.ranks} ranks, rows are summed"
        )

    def _by_outputs(self, op: nn.Linear) -> None:
        name = op.weight.root_reference.data
        sinks = _sinks(op.result)
        keys = any(isinstance(sink, nn.KvWrite) for sink in sinks)
        takes = (nn.KvWrite,) if keys else _TAKE_PARTS
        if any(isinstance(sink, (nn.Split, nn.SiluMul)) for sink in sinks):
            raise _late(op, name)
        if others := [sink for sink in sinks if not isinstance(sink, takes)]:
            self.shard.declined(self.context, op, f"@{name}: {others[0].name} reads all of its product")
            return
        heads = _head_dim(op.result)
        count = last_dim(op.result.type) // (heads or 1)
        if keys:
            parts = self._kv_parts(op, count)
        else:
            parts = self._divides(op, count, "heads" if heads else "columns")
        self._cut(op, name, 0, parts)
        if op.bias is not None:
            self._cut(op, op.bias.root_reference.data, 0, parts)
        self._part(op.result, parts)
        copies = f", each part on {self.ranks // parts}" if parts < self.ranks else ""
        self.shard.applied(
            self.context, op, f"@{name}: its outputs are divided among {self.ranks} ranks{copies}"
        )

    def _by_inputs(self, op: nn.Linear) -> None:
        name = op.weight.root_reference.data
        self._cut(op, name, 1, self.ranks)
        if op.bias is not None:
            self._tensor(op, op.bias.root_reference.data).properties["once"] = FLAG
        self._sum(op, op.result)
        self.shard.applied(
            self.context, op, f"@{name}: its inputs are divided among {self.ranks} ranks, products are summed"
        )

    def _sum(self, op: Operation, value: SSAValue) -> None:
        total = comm.AllReduce.create(
            operands=[value], result_types=[value.type], properties=properties({"group": GROUP})
        )
        value.replace_uses_with_if(total.result, lambda use: use.operation is not total)
        insert_after(op, created(total))

    def _gather(self, op: Operation) -> None:
        """An operation that knows nothing of parts gets the whole."""
        for index, value in enumerate(op.operands):
            if (parts := self.parts.get(value)) is not None:
                size = shape_of(value.type)[-1] * parts
                whole = comm.AllGather.create(
                    operands=[value],
                    result_types=[tensor(dtype_name(value.type), None, size)],
                    properties=properties({"group": GROUP, "dim": 1}),
                )
                insert_before(op, created(whole))
                op.operands[index] = whole.result

    def _follow(self, value: SSAValue, result: SSAValue) -> None:
        if (parts := self.parts.get(value)) is not None:
            self._part(result, parts)

    def _part(self, value: SSAValue, parts: int) -> None:
        self.parts[value] = parts
        retype(value, tensor(dtype_name(value.type), None, last_dim(value.type) // parts))

    def _divides(self, op: Operation, count: int, what: str) -> int:
        if count % self.ranks:
            raise UserError(
                f"shard: {describe(op)} has {count} {what} for {self.ranks} ranks; "
                f"accepted: a number of ranks that divides {count}"
            )
        return self.ranks

    def _kv_parts(self, op: Operation, heads: int) -> int:
        if heads % self.ranks and self.ranks % heads:
            raise UserError(
                f"shard: {describe(op)} has {heads} KV heads for {self.ranks} ranks; "
                f"accepted: a number of ranks that divides {heads} or is a multiple of it"
            )
        return min(heads, self.ranks)

    def _tensor(self, op: Operation, name: str) -> weights.Tensor:
        made = maker(self.stores[name].x) if name in self.stores else None
        if not isinstance(made, weights.Tensor) or len(users(made.result)) != 1:
            raise _late(op, name)
        return made

    def _cut(self, op: Operation, name: str, dim: int, parts: int) -> None:
        if parts == 1:
            return
        source = self._tensor(op, name)
        shape = list(shape_of(source.result.type))
        shape[dim] //= parts
        source.properties |= {"dim": integer(dim), "parts": integer(parts)}
        retype(source.result, tensor(dtype_name(source.result.type), *shape))


def _late(op: Operation, name: str) -> UserError:
    return UserError(
        f"shard: @{name} of {describe(op)} is joined or packed already; "
        "accepted: shard before kernel-fusion and pack-weights"
    )


_ACT_ON_PARTS = (nn.Rope, nn.Silu, nn.Mul)
_TAKE_PARTS = (nn.Linear, nn.Attention, nn.Cast, nn.Return)
"""Where the parts of a product may end, if not in the cache: in attention, the next product, or the logits."""


def _acts_on_parts(op: Operation) -> bool:
    return isinstance(op, _ACT_ON_PARTS) or (isinstance(op, nn.RmsNorm) and op.heads is not None)


def _results(op: Operation, value: SSAValue) -> Sequence[SSAValue]:
    """What becomes of a part of `value` in an operation that acts on parts."""
    if isinstance(op, nn.Rope):
        return [op.q_out] * (op.q is value) + [op.k_out] * (op.k is value)
    return list(op.results)


def _sinks(value: SSAValue) -> list[Operation]:
    """Who reads a value in the end, behind operations that act on its parts."""
    found = []
    for user in users(value):
        if _acts_on_parts(user):
            found += [sink for result in _results(user, value) for sink in _sinks(result)]
        else:
            found.append(user)
    return found


def _head_dim(value: SSAValue) -> int:
    """The size of a head where the value has heads, else 0."""
    for user in users(value):
        if isinstance(user, nn.RmsNorm) and user.heads is not None:
            return last_dim(value.type) // user.heads.value.data
        if isinstance(user, (nn.Rope, nn.KvWrite, nn.Attention)):
            return user.head_dim.value.data
    return 0
