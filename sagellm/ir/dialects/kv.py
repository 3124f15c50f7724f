"""What a step does to the KV cache's blocks. Block ids are never in the graph."""

from __future__ import annotations

from typing import ClassVar

from xdsl.dialects.builtin import StringAttr
from xdsl.ir import Dialect
from xdsl.irdl import irdl_op_definition, opt_prop_def, prop_def, result_def, var_operand_def

from sagellm.ir.attrs import BlocksType, GroupType, TableAttr
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


class _Move(SageOp):
    """Blocks that change their place; which ones is in the table."""

    table = prop_def(TableAttr)


@irdl_op_definition
class Evict(_Move):
    """Blocks leave the prefix index, as room is needed."""

    name = "kv.evict"
    WRITES: ClassVar = ("pool",)


@irdl_op_definition
class Offload(_Move):
    """Copy blocks into host memory: those that leave the device, or, `when = ahead`, those that may leave in a later
    step. These stay as they are through this step, so their copy may stand anywhere in it."""

    name = "kv.offload"
    when = opt_prop_def(StringAttr)
    READS: ClassVar = ("kv",)
    WRITES: ClassVar = ("host",)


@irdl_op_definition
class Fetch(_Move):
    """Copy blocks from host memory back to the device: those that the step reads, or, `when = ahead`, those of a
    sequence that still waits. The step does not touch these, so their copy may stand anywhere in it."""

    name = "kv.fetch"
    when = opt_prop_def(StringAttr)
    READS: ClassVar = ("host",)
    WRITES: ClassVar = ("kv",)


@irdl_op_definition
class Copy(_Move):
    """Copy blocks that a sequence writes into and others hold."""

    name = "kv.copy"
    READS: ClassVar = ("kv",)
    WRITES: ClassVar = ("kv",)


KV = Dialect("kv", [Evict, Offload, Fetch, Copy, Allocate], [BlocksType])
