"""Weights in the layout that the backend's matrix product reads fastest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sagellm.ir.attrs import dtype_name, word
from sagellm.ir.build import properties
from sagellm.ir.dialects import nn, weights
from sagellm.ir.edit import insert_before, only_block, operations, parent_function, symbol_name
from sagellm.ir.graph import IRGraph
from sagellm.passes.driver import Pass, PassContext, rewrites


@dataclass(frozen=True)
class PackWeights(Pass):
    """Packs each linear's matrix once, at load time, into the layout that the backend names for the dtype.

    Declines where the backend names none, and for a matrix that something else than linears reads.
    """

    name: ClassVar[str] = "pack-weights"
    graph: ClassVar[Literal["model"]] = "model"

    @rewrites(nn.Linear)
    def pack(self, op: nn.Linear, graph: IRGraph, context: PassContext) -> None:
        if op.layout is not None:
            return
        name = op.weight.root_reference.data
        layout = context.capability.linear_layouts.get(dtype_name(op.x.type))
        if layout is None:
            self.declined(
                context, op, f"{context.capability.backend} names no layout for {dtype_name(op.x.type)}"
            )
            return
        function = parent_function(op)
        readers = [o for o in operations(only_block(function)) if o.properties.get("weight") == op.weight]
        load = graph.loads.get(symbol_name(function))
        store = (
            next(
                (
                    o
                    for o in operations(only_block(load))
                    if isinstance(o, weights.Store) and o.weight == op.weight
                ),
                None,
            )
            if load
            else None
        )
        if store is None or not all(isinstance(reader, nn.Linear) for reader in readers):
            self.declined(
                context, op, f"@{name} is read by other operations or not stored by the weights program"
            )
            return
        pack = weights.Pack.create(
            operands=[store.x], result_types=[store.x.type], properties=properties({"layout": layout})
        )
        pack.result.name_hint = store.x.name_hint
        insert_before(store, pack)
        store.operands[0] = pack.result
        for reader in readers:
            reader.properties["layout"] = word(layout)
        self.applied(context, op, f"@{name} is packed as {layout}")
