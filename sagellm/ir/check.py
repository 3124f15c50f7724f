"""Verification, with errors of one line: `weak` (arity, properties, definitions before uses) and `full`."""

from __future__ import annotations

from functools import cache

from xdsl.dialects.builtin import ModuleOp, StringAttr, SymbolRefAttr
from xdsl.ir import Block, Operation
from xdsl.irdl import VarOperandDef
from xdsl.utils.exceptions import VerifyException

from sagellm.errors import UserError
from sagellm.ir.dialects import batch, nn, weights
from sagellm.ir.edit import maker, only_block, operations


def verify(module: ModuleOp, level: str = "full") -> None:
    """Raise `UserError` naming the first operation that is wrong. Levels: `off`, `weak`, `full`."""
    if level == "off":
        return
    for function in outline(module):
        _verify_block(function)
    if level != "full":
        return
    try:
        module.verify()
    except VerifyException as error:
        raise UserError(f"{_culprit(module)}: {' '.join(str(error).split())}") from error
    _verify_symbols(module)


def outline(module: ModuleOp) -> list[Operation]:
    """The step, functions and loads of a module, each with its block: what everything else takes for granted."""
    functions = list(_body(module).ops)
    for function in functions:
        if not isinstance(function, (batch.Step, nn.Func, weights.Load)):
            raise UserError(
                f"{function.name} at the top of a module; accepted: batch.step, nn.func, weights.load"
            )
        _body(function)
    return functions


def _body(op: Operation) -> Block:
    if len(op.regions) != 1 or len(op.regions[0].blocks) != 1:
        raise UserError(f"{describe(op)}: wants one region with one block, which is not empty")
    return only_block(op)


def _culprit(module: ModuleOp) -> str:
    """The operation that does not verify, of a module that does not."""
    for op in module.walk():
        try:
            op.verify(verify_nested_ops=False)
        except VerifyException:
            return describe(op)
    return module.name


@cache
def _shape(kind: type[Operation]) -> tuple[int, bool, frozenset[str]]:
    """(operands wanted, may there be more, required properties)."""
    definition = kind.get_irdl_definition()  # type: ignore[attr-defined]
    operands = [d for _, d in definition.operands]
    variadic = any(isinstance(d, VarOperandDef) for d in operands)
    required = frozenset(n for n, d in definition.properties.items() if type(d).__name__ == "PropertyDef")
    return len(operands) - variadic, variadic, required


def _verify_block(function: Operation) -> None:
    block = only_block(function)
    defined = {id(argument) for argument in block.args}
    for op in operations(block):
        wanted, variadic, required = _shape(type(op))
        count = len(op._operands)
        if count < wanted or (count > wanted and not variadic):
            raise UserError(f"{describe(op)}: has {count} operands, wants {wanted}{' or more' * variadic}")
        if missing := required - op.properties.keys():
            raise UserError(f"{describe(op)}: lacks the property {sorted(missing)[0]}")
        for operand in op._operands:
            if id(operand) not in defined:
                made_by = maker(operand)
                where = "another function" if made_by is None else made_by.name
                raise UserError(f"{describe(op)}: uses a value before it is defined (made by {where})")
        defined.update(id(result) for result in op.results)


def _verify_symbols(module: ModuleOp) -> None:
    """Functions that are called exist; weights that are used are stored by the weights program, if there is one."""
    functions = {op.sym_name.data: op for op in only_block(module).ops if isinstance(op, nn.Func)}
    loads = {op.fills: op for op in only_block(module).ops if isinstance(op, weights.Load)}
    for function in only_block(module).ops:
        for op in operations(only_block(function)):
            if isinstance(op, (nn.Call, nn.Repeat)):
                _exists(op, op.callee, functions)
            if isinstance(op, batch.Forward) and functions:
                _exists(op, op.model, functions)
            if isinstance(op, batch.Sample) and functions:
                _exists(op, op.sampler, functions)
        if isinstance(function, nn.Func) and function.sym_name.data in loads:
            load = only_block(loads[function.sym_name.data])
            stored = {
                op.weight.root_reference.data for op in operations(load) if isinstance(op, weights.Store)
            }
            for op in operations(only_block(function)):
                for name in weight_names(op):
                    if name not in stored:
                        raise UserError(
                            f"{describe(op)}: no weight @{name} in @{function.sym_name.data}; "
                            f"accepted: {', '.join('@' + s for s in sorted(stored))}"
                        )


def _exists(op: Operation, callee: SymbolRefAttr, functions: dict) -> None:
    name = callee.root_reference.data
    if name not in functions:
        raise UserError(
            f"{describe(op)}: no function @{name}; accepted: {', '.join('@' + f for f in functions)}"
        )


def weight_names(op: Operation) -> list[str]:
    """The weights that an operation of the model graph reads."""
    if isinstance(op, (nn.Call, nn.Repeat)):
        return []
    return [attr.root_reference.data for attr in op.properties.values() if isinstance(attr, SymbolRefAttr)]


def describe(op: Operation) -> str:
    """`nn.func @layers` or `%q = nn.linear (operation 7 of @layers)`: enough to find the operation in a dump."""
    if isinstance(name := op.properties.get("sym_name"), StringAttr):
        return f"{op.name} @{name.data}"
    names = ", ".join(f"%{r.name_hint}" for r in op.results if r.name_hint)
    text = f"{names} = {op.name}" if names else op.name
    function = op.parent_op()
    name = function and function.properties.get("sym_name")
    if function is None or not isinstance(name, StringAttr):
        return text
    index = next(i for i, other in enumerate(operations(only_block(function)), 1) if other is op)
    return f"{text} (operation {index} of @{name.data})"
