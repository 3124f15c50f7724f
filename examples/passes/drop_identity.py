"""An example of a pass: operations that return what they were given are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sagellm.ir.dialects import nn
from sagellm.ir.edit import replace
from sagellm.ir.graph import IRGraph
from sagellm.passes.driver import Pass, PassContext, rewrites


@dataclass(frozen=True)
class DropIdentity(Pass):
    """Drops operations that return what they were given: casts to the same type, and in a step that only decodes the
    choice of the rows whose next token is wanted, since that is every row.

    Declines to drop the choice where some rows belong to a prompt, and where decode rows are padded.
    """

    padded: bool = False
    """The backend fills decode rows up to a bucket; then choosing the rows takes the filling away again."""

    name: ClassVar[str] = "drop-identity"
    graph: ClassVar[Literal["model"]] = "model"

    @rewrites(nn.Cast)
    def cast(self, op: nn.Cast, graph: IRGraph, context: PassContext) -> None:
        if op.x.type != op.result.type:
            return
        self.applied(context, op, "the value has this type already")
        replace(op, [op.x])

    @rewrites(nn.SelectOutputs)
    def select(self, op: nn.SelectOutputs, graph: IRGraph, context: PassContext) -> None:
        phases = op.rows.type.data
        if phases != ("decode",):
            self.declined(context, op, f"not every row of {' and '.join(phases)} gets a token")
            return
        if self.padded:
            self.declined(context, op, "decode rows are padded")
            return
        self.applied(context, op, "every row of a decode step gets a token")
        replace(op, [op.x])
