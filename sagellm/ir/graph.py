"""`IRGraph`: a module of ours with its text, fingerprint, verification and networkx view."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import networkx
from attrs import frozen
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Operation
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import ParseError, VerifyException

from sagellm.errors import UserError, unknown
from sagellm.ir.attrs import TableAttr
from sagellm.ir.check import describe, outline, verify
from sagellm.ir.dialects import batch, context, nn, weights
from sagellm.ir.edit import only_block, operations, symbol_name
from sagellm.ir.syntax import SageOp


@frozen
class IRNode:
    """A node of the networkx view: one operation."""

    op: Operation
    index: int

    @property
    def name(self) -> str:
        return self.op.name

    def __str__(self) -> str:
        return describe(self.op)


class IRGraph:
    """A module: at most one `batch.step`, the functions of the model graph, and the weights program."""

    def __init__(self, module: ModuleOp | None = None):
        self.module = module or ModuleOp([])

    def __iter__(self) -> Iterator[Operation]:
        return iter(self.module.body.blocks[0].ops)

    def add(self, op: Operation) -> None:
        self.module.body.blocks[0].add_op(op)

    @property
    def step(self) -> batch.Step | None:
        return next((op for op in self if isinstance(op, batch.Step)), None)

    @property
    def functions(self) -> dict[str, nn.Func]:
        return {op.sym_name.data: op for op in self if isinstance(op, nn.Func)}

    @property
    def loads(self) -> dict[str, weights.Load]:
        return {op.fills: op for op in self if isinstance(op, weights.Load)}

    @property
    def ranks(self) -> int:
        """How many ranks run this together: the most parts that its weights program cuts a tensor into."""
        return max((op.cut[1] for op in self.walk() if isinstance(op, weights.Tensor) and op.cut), default=1)

    @property
    def kv_heads(self) -> int:
        """KV heads that one rank caches; 1 where nothing is cached."""
        return next((op.kv_heads.value.data for op in self.walk() if isinstance(op, nn.Attention)), 1)

    @property
    def kv_dtype(self) -> str | None:
        """The small type that keys and values are cached in; None: as they are computed."""
        touch = [op for op in self.walk() if isinstance(op, (nn.KvWrite, nn.RopeKvWrite, nn.Attention))]
        found = {None if op.kv_dtype is None else op.kv_dtype.data for op in touch}
        if len(found) > 1:
            raise UserError(
                f"operations of one cache have kv_dtype {', '.join(map(repr, found))}; accepted: one"
            )
        return next(iter(found), None)

    def clone(self) -> IRGraph:
        return IRGraph(self.module.clone())

    def merged(self, other: IRGraph) -> IRGraph:
        """One module with the functions of both."""
        result = self.clone()
        for op in other:
            result.add(op.clone())
        return result

    def walk(self) -> Iterator[Operation]:
        for function in self:
            yield from operations(only_block(function))

    def count(self, kind: type[Operation] | str) -> int:
        """How many operations of a kind, or of a name such as `nn.linear`."""
        return sum(op.name == kind if isinstance(kind, str) else isinstance(op, kind) for op in self.walk())

    # text

    def text(self, *, tables: bool = False, generic: bool = False) -> str:
        """The module as text. `tables` writes the values of every table, one line a request."""
        for op in self.walk():
            if isinstance(op, SageOp):
                for result, hint in zip(op.results, op.result_hints()):
                    if result.name_hint is None:
                        result.name_hint = hint.replace(".", "_")
            for attr in op.properties.values():
                if isinstance(attr, TableAttr):
                    attr.data.expanded = tables
        out = StringIO()
        Printer(out, print_generic_format=generic).print_op(self.module)
        return out.getvalue() + "\n"

    @classmethod
    def parse(cls, text: str, name: str = "<text>") -> IRGraph:
        """Read a module; malformed text gives `file:line:column: what`."""
        if (at := _LITERALS.sub(lambda m: " " * len(m[0]), text).find('"')) >= 0:
            raise _misread(name, text, at, "a string that is not closed, or has an unknown escape")
        try:
            module = Parser(context(), text, name).parse_module()
            outline(module)
            return cls(module)
        except ParseError as error:
            message = error.msg.strip().splitlines()[0]
            message = "an operation or '}' expected" if message == "in block definition" else message
            raise _misread(name, text, error.span.start, message) from error
        except (VerifyException, ValueError) as error:
            raise UserError(f"{name}: {str(error).strip().splitlines()[0]}") from error

    @classmethod
    def read(cls, path: Path) -> IRGraph:
        try:
            return cls.parse(path.read_text(encoding="utf-8"), path.name)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {str(path)!r} as IR text: {error}") from error

    # checks

    def verify(self, level: str = "full") -> None:
        if level not in ("off", "weak", "full"):
            raise unknown("verification level", level, ("off", "weak", "full"))
        verify(self.module, level)

    # views

    def networkx(self, function: str) -> networkx.MultiDiGraph:
        """Operations of one function as nodes; edges carry `kind`: `ssa` (a value) or `effect` (a resource)."""
        block = only_block(next(op for op in self if symbol_name(op) == function))
        return dependences(block)


_LITERALS = re.compile(r'"(?:[^"\\\n\v\f]|\\(?:["nt\\]|[0-9A-Fa-f]{2}))*"|//[^\n]*')
"""Strings and comments. An open string is looked for first: xDSL's lexer takes exponential time over one."""


def _misread(name: str, text: str, at: int, message: str) -> UserError:
    before = text[:at]
    return UserError(f"{name}:{before.count(chr(10)) + 1}:{at - before.rfind(chr(10))}: {message}")


def fingerprint(block: Block) -> tuple:
    """The structure of a block: kinds of operations, wiring, types and properties, but no table's values.

    Interned attributes are compared by identity, so this costs a few calls an operation.
    """
    key: list = []
    numbers: dict = {}
    op = block._first_op
    while op is not None:
        key.append(type(op))
        for operand in op._operands:
            key.append(numbers[operand])
        for attr in op.properties.values():
            key.append(TableAttr if type(attr) is TableAttr else attr)
        for result in op.results:
            numbers[result] = len(numbers)
            key.append(result.type)
        op = op._next_op
    return tuple(map(id, key))


def dependences(block: Block) -> networkx.MultiDiGraph:
    """Who must come before whom: SSA edges, and read/write, write/read, write/write edges per resource."""
    graph = networkx.MultiDiGraph()
    nodes: dict[Operation, IRNode] = {}
    last_write: dict[str, IRNode] = {}
    reads_since: dict[str, list[IRNode]] = {}
    for index, op in enumerate(operations(block)):
        node = nodes[op] = IRNode(op, index)
        graph.add_node(node, label=op.name)
        for operand in op.operands:
            if isinstance(operand.owner, Operation) and operand.owner in nodes:
                graph.add_edge(nodes[operand.owner], node, kind="ssa", value=operand.name_hint or "")
        for resource in getattr(op, "READS", ()):
            if resource in last_write:
                graph.add_edge(last_write[resource], node, kind="effect", value=resource)
            reads_since.setdefault(resource, []).append(node)
        for resource in getattr(op, "WRITES", ()):
            for earlier in reads_since.pop(resource, []):
                if earlier is not node:
                    graph.add_edge(earlier, node, kind="effect", value=resource)
            if resource in last_write and not graph.has_edge(last_write[resource], node):
                graph.add_edge(last_write[resource], node, kind="effect", value=resource)
            last_write[resource] = node
    return graph
