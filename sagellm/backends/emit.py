"""Python source from a model graph: what all backends' code generators share.

A backend gives a table from operation name to a function `(emitter, op) -> expression or lines`. Functions become
Python functions of their weights `w`, their layer's cache `kv` and the ranks' collectives `comm` where they touch
them, and their arguments.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping

from xdsl.dialects.builtin import FloatAttr, IntegerAttr, StringAttr
from xdsl.ir import Attribute, Block, Operation, SSAValue

from sagellm.backends.plan import Program
from sagellm.errors import UserError
from sagellm.ir.attrs import RowsType, dtype_name, last_dim, real
from sagellm.ir.dialects import comm, nn, weights
from sagellm.ir.edit import only_block, operations
from sagellm.ir.graph import IRGraph

Line = Callable[["Emitter", Operation], str]
"""Gives the right-hand side of an assignment to the operation's results; a whole statement where it has none, or as
a `Statement`."""


class Statement(str):
    """Text that assigns the operation's results itself, as where a call gives more than these or in another order."""


def identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name)
    return f"{name}_" if keyword.iskeyword(name) else name


class Emitter:
    """Names and lines of one function."""

    def __init__(self, table: Mapping[str, Line]):
        self.table = table
        self.names: dict[SSAValue, str] = {}
        self.taken: set[str] = {"w", "kv", "comm", "weights", "cache"}
        self.lines: list[str] = []
        self.calls = 0

    def name(self, value: SSAValue) -> str:
        if value not in self.names:
            base = identifier(value.name_hint or "v")
            name, n = base, 1
            while name in self.taken:
                n += 1
                name = f"{base}_{n}"
            self.taken.add(name)
            self.names[value] = name
        return self.names[value]

    def names_of(self, values) -> str:
        return ", ".join(self.name(value) for value in values)

    def rows(self, op: Operation) -> str:
        """The rows' name in the function of an operation that does not take them itself."""
        arguments = op.parent.args if op.parent is not None else ()
        for argument in arguments:
            if isinstance(argument.type, RowsType):
                return self.name(argument)
        raise UserError(f"{op.name} in a function without rows; accepted: one that takes them")

    def weight(self, op: Operation, key: str = "weight") -> str:
        attr = op.properties.get(key)
        return "None" if attr is None else f"w.{identifier(attr.root_reference.data)}"

    def value(self, op: Operation, key: str):
        """A property as a Python value."""
        attr = op.properties.get(key)
        match attr:
            case IntegerAttr():
                return attr.value.data
            case FloatAttr():
                return attr.value.data
            case StringAttr():
                return attr.data
        return attr

    def emit(self, op: Operation) -> None:
        line = self.table.get(op.name)
        if line is None:
            raise UserError(f"no code for {op.name}; accepted: {', '.join(sorted(self.table))}")
        text = line(self, op)
        self.calls += 1
        assigned = not op.results or isinstance(text, Statement)
        self.lines.append(text if assigned else f"{self.names_of(op.results)} = {text}")


def emit_program(
    graph: IRGraph, table: Mapping[str, Line], loads: Mapping[str, Line], header: str, name: str
) -> Program:
    """All functions of the graph and its weights program, as one Python module."""
    parts, calls = [header], {}
    for function in graph.functions.values():
        emitter = Emitter(table)
        parts.append(_function(function, emitter))
        calls[function.sym_name.data] = emitter.calls
    if graph.loads:
        for load in graph.loads.values():
            parts.append(_load(load, Emitter(loads)))
        parts.append(_load_all(list(graph.loads.values())))
    return Program(name, "\n\n\n".join(part.strip("\n") for part in parts) + "\n", calls)


def touches_cache(function: nn.Func) -> bool:
    return any("kv" in (*op.READS, *op.WRITES) for op in operations(only_block(function)))


def touches_network(function: nn.Func) -> bool:
    """Whether it, or a function that it calls, takes part in collectives."""
    module = function.parent
    for op in operations(only_block(function)):
        if "group" in op.properties:
            return True
        if isinstance(op, (nn.Call, nn.Repeat)) and module is not None:
            callee = op.callee.root_reference.data
            if touches_network(_callee(module, callee)):
                return True
    return False


def _callee(module: Block, name: str) -> nn.Func:
    return next(f for f in operations(module) if isinstance(f, nn.Func) and f.sym_name.data == name)


def _function(function: nn.Func, emitter: Emitter) -> str:
    block, name = only_block(function), identifier(function.sym_name.data)
    arguments = [emitter.name(argument) for argument in block.args]
    ranks = ["comm"] if touches_network(function) else []
    whole = any(isinstance(op, (nn.Call, nn.Repeat)) for op in operations(block))
    if whole:
        signature = ["weights", "cache", *ranks, *arguments]
    else:
        sampler = not any("weight" in op.properties for op in operations(block))
        kv = ["kv"] if touches_cache(function) else []
        signature = [*([] if sampler else ["w"]), *kv, *ranks, *arguments]
    for op in operations(block):
        match op:
            case nn.Return():
                emitter.lines.append(f"return {emitter.names_of(op.operands)}")
            case nn.Call() | nn.Repeat():
                _call(op, function, emitter)
            case _:
                emitter.emit(op)
    body = "\n".join(f"    {line}" for text in emitter.lines for line in text.splitlines())
    return f"def {name}({', '.join(signature)}):\n{body}"


def _call(op: nn.Call | nn.Repeat, caller: nn.Func, emitter: Emitter) -> None:
    callee = op.callee.root_reference.data
    assert caller.parent is not None
    target = _callee(caller.parent, callee)
    kv, ranks = touches_cache(target), ["comm"] if touches_network(target) else []
    results, name = emitter.names_of(op.results), identifier(callee)
    if isinstance(op, nn.Call):
        arguments = [f"weights.{name}", *(["cache"] if kv else []), *ranks, *map(emitter.name, op.operands)]
        emitter.lines.append(f"{results} = {name}({', '.join(arguments)})")
        return
    first, count = op.first.value.data, op.count.value.data
    carried = len(op.results)
    start = ", ".join(emitter.name(v) for v in op.operands[:carried])
    rest = [emitter.name(v) for v in op.operands[carried:]]
    arguments = ["w", *(["kv"] if kv else []), *ranks, results, *rest]
    emitter.lines.append(
        f"{results} = {start}\n"
        f"for w, kv in zip(weights.{name}, cache[{first}:{first + count}]):\n"
        f"    {results} = {name}({', '.join(arguments)})"
    )


def _load(load: weights.Load, emitter: Emitter) -> str:
    name = identifier(load.fills)
    for op in operations(only_block(load)):
        if isinstance(op, weights.Store):
            emitter.lines.append(f"w.{identifier(op.weight.root_reference.data)} = {emitter.name(op.x)}")
        else:
            emitter.emit(op)
    body = "\n".join(f"    {line}" for text in emitter.lines for line in text.splitlines())
    return f"def load_{name}(read, layer, last):\n    w = SimpleNamespace()\n{body}\n    return w"


def _load_all(loads: list[weights.Load]) -> str:
    lines = []
    for load in loads:
        name, first, count = identifier(load.fills), load.first.value.data, load.count.value.data
        if name.startswith("layers"):
            end = first + count
            call = f"[load_{name}(read, layer, layer == {end - 1}) for layer in range({first}, {end})]"
        else:
            call = f"load_{name}(read, 0, True)"
        lines.append(f"    weights.{name} = {call}")
    body = "\n".join(lines)
    return f"def load(read):\n    weights = SimpleNamespace()\n{body}\n    return weights"


def source_name(op: weights.Tensor) -> str:
    """The Python expression of a checkpoint tensor's name."""
    source = op.source.data
    text = f'f"{source}"' if "{" in source else f'"{source}"'
    return text if op.last is None else f'("{op.last.data}" if last else {text})'


def read_tensor(op: weights.Tensor) -> str:
    """The Python expression that reads a checkpoint's tensor, or this rank's part of it."""
    more = f", dim={op.cut[0]}, parts={op.cut[1]}" if op.cut else ""
    once = ", once=True" if op.once is not None else ""
    return f"read({source_name(op)}, {torch_dtype(op.result.type)}{more}{once})"


def _collective(e: Emitter, op: Operation) -> str:
    arguments = [
        e.name(op.operands[0]),
        *(["dim={}".format(e.value(op, "dim"))] if "dim" in op.properties else []),
    ]
    if (kind := e.value(op, "collective")) is not None:
        return f'comm.start("{kind}", {", ".join(arguments)})'
    return f"comm.{op.name.removeprefix('comm.')}({', '.join(arguments)})"


def _recv(e: Emitter, op: Operation) -> str:
    (like,), result = op.operands, op.results[0].type
    rows = f"len({e.name(like)}{'.tokens' if isinstance(like.type, RowsType) else ''})"
    return f"comm.recv({rows}, {last_dim(result)}, {torch_dtype(result)}, {e.value(op, 'shift')})"


COLLECTIVES: dict[str, Line] = {
    **{f"comm.{kind}": _collective for kind in ("start", *comm.COLLECTIVES)},
    "comm.wait": lambda e, op: f"{e.name(op.operands[0])}.wait()",
    "comm.send": lambda e, op: f"comm.send({e.name(op.operands[0])}, {e.value(op, 'shift')})",
    "comm.recv": _recv,
}
"""Calls of a `CommBackendProtocol`, the same for every backend."""


def torch_dtype(type_: Attribute) -> str:
    return f"torch.{dtype_name(type_)}"


def literal(value: float | int) -> str:
    return real(value) if isinstance(value, float) else str(value)
