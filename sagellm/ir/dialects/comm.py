"""Collectives between the ranks of one engine."""

from __future__ import annotations

from typing import ClassVar

from xdsl.dialects.builtin import IntegerAttr, StringAttr, TensorType
from xdsl.ir import Dialect
from xdsl.irdl import irdl_op_definition, operand_def, prop_def, result_def

from sagellm.ir.syntax import SageOp


class _Collective(SageOp):
    READS: ClassVar = ("network",)
    WRITES: ClassVar = ("network",)


@irdl_op_definition
class AllReduce(_Collective):
    """The sum over the ranks of `group`, on each of them."""

    name = "comm.all_reduce"
    group = prop_def(StringAttr)
    x = operand_def(TensorType)
    result = result_def(TensorType)
    HINTS: ClassVar = ("sum",)


@irdl_op_definition
class AllGather(_Collective):
    """The ranks' tensors joined along `dim`, on each of them."""

    name = "comm.all_gather"
    group = prop_def(StringAttr)
    dim = prop_def(IntegerAttr)
    x = operand_def(TensorType)
    result = result_def(TensorType)
    HINTS: ClassVar = ("all",)


@irdl_op_definition
class ReduceScatter(_Collective):
    """The sum over the ranks, of which each keeps its part along `dim`."""

    name = "comm.reduce_scatter"
    group = prop_def(StringAttr)
    dim = prop_def(IntegerAttr)
    x = operand_def(TensorType)
    result = result_def(TensorType)
    HINTS: ClassVar = ("part",)


COMM = Dialect("comm", [AllReduce, AllGather, ReduceScatter], [])
