"""Collectives between the ranks of one engine. All ranks run one program, so all come to each of them in one order.

N ranks, rank r from 0. A collective stands for itself, or as a pair: `comm.start` brings this rank's tensor,
`comm.wait` gives the result; what stands between the two runs while the network is busy.
"""

from __future__ import annotations

from typing import ClassVar

from xdsl.dialects.builtin import IntegerAttr, StringAttr, SymbolRefAttr, TensorType
from xdsl.ir import Dialect
from xdsl.irdl import irdl_op_definition, operand_def, opt_prop_def, prop_def, result_def
from xdsl.utils.exceptions import VerifyException

from sagellm.ir.attrs import PendingType, RowsType, dtype_name
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
class LinearAllReduce(_Collective):
    """`x @ weight.T`, weight [out, in], and its sum over the ranks of `group`, on each of them."""

    name = "comm.linear_all_reduce"
    weight = prop_def(SymbolRefAttr)
    group = prop_def(StringAttr)
    x = operand_def(TensorType)
    result = result_def(TensorType)
    SYMBOLS: ClassVar = ("weight",)
    HINTS: ClassVar = ("sum",)

    def verify_(self) -> None:
        if dtype_name(self.x.type) != dtype_name(self.result.type):
            raise VerifyException("comm.linear_all_reduce keeps the dtype of its input")


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


@irdl_op_definition
class AllToAll(_Collective):
    """Each rank cuts its tensor into N parts along `dim`; rank r gets everybody's part r, joined in their order."""

    name = "comm.all_to_all"
    group = prop_def(StringAttr)
    dim = prop_def(IntegerAttr)
    x = operand_def(TensorType)
    result = result_def(TensorType)
    HINTS: ClassVar = ("mine",)


@irdl_op_definition
class Send(_Collective):
    """To rank r + `shift`, around the end; its `comm.recv` has the same shift."""

    name = "comm.send"
    group = prop_def(StringAttr)
    shift = prop_def(IntegerAttr)
    x = operand_def(TensorType)


@irdl_op_definition
class Recv(_Collective):
    """From rank r - `shift`, around the end: a tensor with as many rows as `like` has."""

    name = "comm.recv"
    group = prop_def(StringAttr)
    shift = prop_def(IntegerAttr)
    like = operand_def(RowsType | TensorType)
    result = result_def(TensorType)
    HINTS: ClassVar = ("x",)


COLLECTIVES: dict[str, type[SageOp]] = {
    "all_reduce": AllReduce,
    "all_gather": AllGather,
    "reduce_scatter": ReduceScatter,
    "all_to_all": AllToAll,
}
"""What `comm.start` can start."""


@irdl_op_definition
class Start(_Collective):
    """Begin a collective of the kind `collective`; its tensor must not be written to before the wait."""

    name = "comm.start"
    collective = prop_def(StringAttr)
    group = prop_def(StringAttr)
    dim = opt_prop_def(IntegerAttr)
    x = operand_def(TensorType)
    result = result_def(PendingType)
    HINTS: ClassVar = ("pending",)

    def verify_(self) -> None:
        kind = COLLECTIVES.get(self.collective.data)
        if kind is None:
            raise VerifyException(f"comm.start of {self.collective.data}; accepted: {', '.join(COLLECTIVES)}")
        if ("dim" in kind.get_irdl_definition().properties) != (self.dim is not None):
            raise VerifyException(f"comm.start: {self.collective.data} and its dim do not fit")


@irdl_op_definition
class Wait(SageOp):
    """The result of a collective that was begun. Waits may stand in any order."""

    name = "comm.wait"
    pending = operand_def(PendingType)
    result = result_def(TensorType)
    HINTS: ClassVar = ("done",)


COMM = Dialect(
    "comm",
    [AllReduce, LinearAllReduce, AllGather, ReduceScatter, AllToAll, Send, Recv, Start, Wait],
    [PendingType],
)
