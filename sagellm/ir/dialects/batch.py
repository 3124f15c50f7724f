"""The batch graph: what one step does to which sequences. Ops work on groups, never on single requests."""

from __future__ import annotations

from typing import ClassVar

from xdsl.dialects.builtin import (
    ArrayAttr,
    IntegerAttr,
    StringAttr,
    SymbolNameConstraint,
    SymbolRefAttr,
    TensorType,
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
from xdsl.traits import IsolatedFromAbove, IsTerminator, NoTerminator, SymbolOpInterface

from sagellm.ir.attrs import BlocksType, GroupType, RowsType, SamplingType, TableAttr
from sagellm.ir.syntax import SageOp


@irdl_op_definition
class Step(SageOp):
    """One step of the engine: a straight line of operations that ends in `batch.commit` or `batch.report`."""

    name = "batch.step"
    sym_name = prop_def(SymbolNameConstraint())
    body = region_def("single_block")
    traits = traits_def(IsolatedFromAbove(), SymbolOpInterface(), NoTerminator())

    def print(self, printer: Printer) -> None:
        printer.print_string(" ")
        printer.print_symbol_name(self.sym_name.data)
        printer.print_string(" ")
        printer.print_region(self.body)

    @classmethod
    def parse(cls, parser: Parser) -> Step:
        name = parser.parse_symbol_name()
        return cls.create(properties={"sym_name": name}, regions=[parser.parse_region()])


@irdl_op_definition
class Group(SageOp):
    """The sequences of one phase. `bucket` is the token count rounded up to a power of two.

    `facts` are what passes decided about this step (a pass's `decide`), as flags; the values are in the table.
    """

    name = "batch.group"
    phase = prop_def(StringAttr)
    bucket = prop_def(IntegerAttr)
    facts = opt_prop_def(ArrayAttr)
    table = prop_def(TableAttr)
    result = result_def(GroupType)
    READS: ClassVar = ("sequences",)

    def result_hints(self) -> tuple[str, ...]:
        return (self.phase.data,)


@irdl_op_definition
class Share(SageOp):
    """Rows whose beginning another row of the group computes: they wait for it and forward only the rest.

    The table's columns `leader` and `shared` say of whom and how many tokens.
    """

    name = "batch.share"
    group = operand_def(GroupType)
    result = result_def(GroupType)
    HINTS: ClassVar = ("shared",)


@irdl_op_definition
class Cascade(SageOp):
    """Decode rows that have the same first KV blocks read these together, and each the rest of its own.

    The table's columns `cohort` and `common` say who and how many tokens. What attention gives is the same.
    """

    name = "batch.cascade"
    group = operand_def(GroupType)
    result = result_def(GroupType)
    HINTS: ClassVar = ("cascade",)


@irdl_op_definition
class Rows(SageOp):
    """All rows of the groups on one flattened token axis, decodes first."""

    name = "batch.rows"
    arguments = var_operand_def(GroupType | BlocksType)
    result = result_def(RowsType)
    READS: ClassVar = ("sequences", "pool")
    HINTS: ClassVar = ("rows",)


@irdl_op_definition
class Sampling(SageOp):
    """The sampling columns of the groups, one row per sequence that gets a token in this step."""

    name = "batch.sampling"
    groups = var_operand_def(GroupType)
    result = result_def(SamplingType)
    READS: ClassVar = ("sequences",)
    HINTS: ClassVar = ("how",)


@irdl_op_definition
class Forward(SageOp):
    """Run a function of the model graph over the rows; its result has one row per output row.

    Rows of prompts whose logprobs are wanted follow behind; only `batch.commit` reports them.
    """

    name = "batch.forward"
    model = prop_def(SymbolRefAttr)
    rows = operand_def(RowsType)
    result = result_def(TensorType)
    READS: ClassVar = ("kv",)
    WRITES: ClassVar = ("kv",)
    SYMBOLS: ClassVar = ("model",)
    HINTS: ClassVar = ("logits",)


@irdl_op_definition
class Sample(SageOp):
    """Choose one token per output row with a function of the model graph."""

    name = "batch.sample"
    sampler = prop_def(SymbolRefAttr)
    logits = operand_def(TensorType)
    how = operand_def(SamplingType)
    result = result_def(TensorType)
    SYMBOLS: ClassVar = ("sampler",)
    HINTS: ClassVar = ("tokens",)


@irdl_op_definition
class Commit(SageOp):
    """End of the step: the tokens are appended, what was computed counts as cached."""

    name = "batch.commit"
    tokens = operand_def(TensorType)
    groups = var_operand_def(GroupType | BlocksType)
    WRITES: ClassVar = ("sequences",)
    traits = traits_def(IsTerminator())


@irdl_op_definition
class Report(SageOp):
    """End of a step of prompts whose vectors are wanted: what was computed counts as cached, no token is chosen."""

    name = "batch.report"
    vectors = operand_def(TensorType)
    groups = var_operand_def(GroupType | BlocksType)
    WRITES: ClassVar = ("sequences",)
    traits = traits_def(IsTerminator())


BATCH = Dialect(
    "batch",
    [Step, Group, Share, Cascade, Rows, Sampling, Forward, Sample, Commit, Report],
    [GroupType, RowsType, SamplingType, TableAttr],
)
