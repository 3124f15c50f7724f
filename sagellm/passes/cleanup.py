"""Common subexpressions are computed once, results nobody reads not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from xdsl.ir import Operation
from xdsl.traits import IsTerminator

from sagellm.ir.edit import erase, only_block, operations, replace
from sagellm.ir.graph import IRGraph
from sagellm.passes.driver import Pass, PassContext


@dataclass(frozen=True)
class Cleanup(Pass):
    """Merges operations without effects that have the same inputs and properties; drops those without use.

    Declines nothing: where there is nothing to merge or to drop, the graph stays as it is.
    """

    name: ClassVar[str] = "cleanup"
    graph: ClassVar[Literal["model"]] = "model"

    def apply(self, graph: IRGraph, context: PassContext) -> None:
        for function in graph:
            block = only_block(function)
            seen: dict[tuple, Operation] = {}
            for op in operations(block):
                if not _pure(op):
                    continue
                key = (type(op), *map(id, op.operands), *op.properties.items(), *op.result_types)
                if (first := seen.setdefault(key, op)) is not op:
                    self.applied(context, op, "the same as an earlier operation")
                    replace(op, first.results)
            for op in reversed(list(operations(block))):
                if _pure(op) and not any(result.uses.get_length() for result in op.results):
                    self.applied(context, op, "nobody reads its result")
                    erase(op)


def _pure(op: Operation) -> bool:
    effects = getattr(op, "READS", ()) or getattr(op, "WRITES", ())
    return not effects and not op.regions and not op.has_trait(IsTerminator) and bool(op.results)
