"""The weights program: how each runtime tensor is derived from tensors of the checkpoint."""

from __future__ import annotations

from typing import ClassVar

from xdsl.dialects.builtin import (
    DictionaryAttr,
    IntegerAttr,
    StringAttr,
    SymbolNameConstraint,
    SymbolRefAttr,
    TensorType,
    UnitAttr,
)
from xdsl.ir import Dialect
from xdsl.irdl import (
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    prop_def,
    region_def,
    result_def,
    traits_def,
    var_operand_def,
)
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.traits import IsolatedFromAbove, NoTerminator, SymbolOpInterface
from xdsl.utils.exceptions import VerifyException

from sagellm.ir.attrs import integer, shape_of
from sagellm.ir.syntax import SageOp


@irdl_op_definition
class Load(SageOp):
    """`@load.F` fills the weights of the function `@F`, once for each layer `first` .. `first + count - 1`.

    Functions that are no layers have count 1 and no layer number in their tensors' names.
    """

    name = "weights.load"
    sym_name = prop_def(SymbolNameConstraint())
    first = prop_def(IntegerAttr)
    count = prop_def(IntegerAttr)
    body = region_def("single_block")
    traits = traits_def(IsolatedFromAbove(), SymbolOpInterface(), NoTerminator())

    @property
    def fills(self) -> str:
        """The function whose weights these are."""
        return self.sym_name.data.removeprefix("load.")

    def print(self, printer: Printer) -> None:
        printer.print_string(" ")
        printer.print_symbol_name(self.sym_name.data)
        printer.print_string(
            f" layers {self.first.value.data} to {self.first.value.data + self.count.value.data} "
        )
        printer.print_region(self.body)

    @classmethod
    def parse(cls, parser: Parser) -> Load:
        name = parser.parse_symbol_name()
        parser.parse_keyword("layers")
        first = parser.parse_integer()
        parser.parse_keyword("to")
        count = parser.parse_integer() - first
        return cls.create(
            properties={"sym_name": name, "first": integer(first), "count": integer(count)},
            regions=[parser.parse_region()],
        )


@irdl_op_definition
class Tensor(SageOp):
    """A tensor of the checkpoint. `{layer}` and `{layer+1}` stand for numbers; `last` is its name in the last layer.

    With `parts`, each rank reads one of so many equal parts along `dim`: of N ranks, rank r reads part r * parts / N,
    rounded down. With `once`, rank 0 reads it and others have zeros: it is added once to a sum over the ranks.
    """

    name = "weights.tensor"
    source = prop_def(StringAttr)
    last = opt_prop_def(StringAttr)
    dim = opt_prop_def(IntegerAttr)
    parts = opt_prop_def(IntegerAttr)
    once = opt_prop_def(UnitAttr)
    result = result_def(TensorType)

    @property
    def cut(self) -> tuple[int, int] | None:
        """(dim, parts) where ranks read parts."""
        if self.dim is None or self.parts is None:
            return None
        return self.dim.value.data, self.parts.value.data

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Its shape in the checkpoint."""
        shape = list(shape_of(self.result.type))
        if self.cut is not None:
            dim, parts = self.cut
            shape[dim] *= parts
        return tuple(shape)

    def verify_(self) -> None:
        if (self.dim is None) != (self.parts is None):
            raise VerifyException("weights.tensor wants dim and parts, or neither")
        if self.cut is not None and not 0 <= self.cut[0] < len(shape_of(self.result.type)):
            raise VerifyException(f"weights.tensor has no dimension {self.cut[0]}")


@irdl_op_definition
class Concat(SageOp):
    """Join along the first dimension."""

    name = "weights.concat"
    parts = var_operand_def(TensorType)
    result = result_def(TensorType)

    def verify_(self) -> None:
        if sum(shape_of(t)[0] for t in self.operand_types) != shape_of(self.result.type)[0]:
            raise VerifyException("weights.concat: the parts do not add up to the result")


@irdl_op_definition
class RopeTable(SageOp):
    """cos and sin of every position [positions, D] for a rope of this `kind`; `parameters` as in the checkpoint."""

    name = "weights.rope_table"
    kind = prop_def(StringAttr)
    parameters = prop_def(DictionaryAttr)
    result = result_def(TensorType)


@irdl_op_definition
class Pack(SageOp):
    """Reorder a matrix into the `layout` that a backend's linear wants; only that linear can read it."""

    name = "weights.pack"
    layout = prop_def(StringAttr)
    x = operand_def(TensorType)
    result = result_def(TensorType)


@irdl_op_definition
class Store(SageOp):
    """This tensor is the runtime weight `@name` of the function."""

    name = "weights.store"
    weight = prop_def(SymbolRefAttr)
    x = operand_def(TensorType)
    SYMBOLS: ClassVar = ("weight",)
    WRITES: ClassVar = ("weights",)


WEIGHTS = Dialect("weights", [Load, Tensor, Concat, RopeTable, Pack, Store], [])
