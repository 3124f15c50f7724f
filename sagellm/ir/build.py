"""Writing functions of the model graph: an emitter over a block."""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects.builtin import ArrayAttr
from xdsl.ir import Attribute, Block, Operation, Region, SSAValue

from sagellm.ir.attrs import FLAG, integer, number, symbol, word
from sagellm.ir.dialects import nn, weights
from sagellm.ir.syntax import SageOp

SYMBOL_PROPERTIES = ("weight", "bias", "callee", "model", "sampler")


def properties(values: dict) -> dict[str, Attribute]:
    """Python values as interned attributes; None and False leave a property out."""
    return {name: attribute(name, v) for name, v in values.items() if v is not None and v is not False}


def attribute(name: str, value: object) -> Attribute:
    match value:
        case Attribute():
            return value
        case True:
            return FLAG
        case int():
            return integer(value)
        case float():
            return number(value)
        case str():
            return symbol(value) if name in SYMBOL_PROPERTIES else word(value)
        case list() | tuple():
            return ArrayAttr([attribute("", item) for item in value])
    raise TypeError(f"no attribute for {name}={value!r}")


class Body:
    """Appends operations to a block; `body(nn.Add, x, y, type)` gives the result."""

    def __init__(self, arguments: dict[str, Attribute]):
        self.block = Block(arg_types=list(arguments.values()))
        for name, argument in zip(arguments, self.block.args):
            argument.name_hint = name

    def arguments(self) -> Sequence[SSAValue]:
        return self.block.args

    def __call__(self, op_type: type[SageOp], operands: Sequence[SSAValue], /, *types: Attribute, **values):
        """The operation's results: nothing, one value, or a tuple."""
        op = op_type.create(operands=operands, result_types=types, properties=properties(values))
        self.block.add_op(op)
        for result, hint in zip(op.results, op.result_hints()):
            result.name_hint = hint.replace(".", "_")
        return op.results[0] if len(op.results) == 1 else tuple(op.results)

    def function(self, name: str, results: Sequence[SSAValue]) -> nn.Func:
        self.block.add_op(nn.Return.create(operands=results))
        return nn.Func.new(name, [a.type for a in self.block.args], [r.type for r in results], self.block)


def load_program(name: str, first: int, count: int, body: Body) -> weights.Load:
    """The part of the weights program that fills the function `name`."""
    return weights.Load.create(
        properties={"sym_name": word(f"load.{name}"), "first": integer(first), "count": integer(count)},
        regions=[Region(body.block)],
    )


def created(op: Operation) -> Operation:
    """Give an operation's results the names they have in a dump."""
    if isinstance(op, SageOp):
        for result, hint in zip(op.results, op.result_hints()):
            result.name_hint = hint.replace(".", "_")
    return op
