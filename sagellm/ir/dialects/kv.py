"""What a step does to the KV cache's blocks. Block ids are never in the graph."""

from __future__ import annotations

from typing import ClassVar

from xdsl.ir import Dialect
from xdsl.irdl import irdl_op_definition, result_def, var_operand_def

from sagellm.ir.attrs import BlocksType, GroupType
from sagellm.ir.syntax import SageOp


@irdl_op_definition
class Allocate(SageOp):
    """Give each sequence of the groups the blocks that its new tokens need.

    A row that shares a beginning takes over its leader's full blocks and gets blocks of its own from there on.
    """

    name = "kv.allocate"
    groups = var_operand_def(GroupType)
    result = result_def(BlocksType)
    READS: ClassVar = ("sequences",)
    WRITES: ClassVar = ("pool",)
    HINTS: ClassVar = ("blocks",)


KV = Dialect("kv", [Allocate], [BlocksType])
