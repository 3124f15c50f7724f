"""A step's graph as a plan: one call per operation, on numbered slots. The same for every backend."""

from __future__ import annotations

from xdsl.dialects.builtin import StringAttr, SymbolRefAttr
from xdsl.ir import Block

from sagellm.backends.plan import Call, ExecutionPlan
from sagellm.ir.dialects import batch
from sagellm.ir.edit import operations


def emit_step(block: Block) -> ExecutionPlan:
    slots: dict = {}
    calls = []
    for op in operations(block):
        inputs = tuple(slots[value] for value in op.operands)
        for result in op.results:
            slots[result] = len(slots)
        outputs = tuple(slots[result] for result in op.results)
        calls.append(Call(op.name, inputs, outputs, _static(op)))
    return ExecutionPlan(tuple(calls), len(slots))


def _static(op) -> dict:
    """Properties that the host function needs, and the type's words that pick the variant of a called function."""
    values: dict = {}
    for name, attr in op.properties.items():
        if isinstance(attr, StringAttr):
            values[name] = attr.data
        elif isinstance(attr, SymbolRefAttr):
            values[name] = attr.root_reference.data
    if isinstance(op, batch.Forward):
        values["kinds"] = op.rows.type.data
    if isinstance(op, batch.Sample):
        values["stages"] = op.how.type.data
    return values
