"""Small edits of a block, and the only loops over xDSL's private links (its own iterators cost five times more)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from xdsl.dialects.builtin import StringAttr
from xdsl.ir import Attribute, Block, Operation, SSAValue


def operations(block: Block) -> Iterator[Operation]:
    """The block's operations in order; only the current one may be erased meanwhile."""
    op = block._first_op
    while op is not None:
        following = op._next_op
        yield op
        op = following


def only_block(op: Operation) -> Block:
    return op.regions[0].blocks[0]


def symbol_name(op: Operation) -> str:
    """The name of a function, step or load."""
    name = op.properties["sym_name"]
    assert isinstance(name, StringAttr)
    return name.data


def parent_function(op: Operation) -> Operation:
    """The function, step or load that holds the operation."""
    parent = op.parent_op()
    assert parent is not None
    return parent


def maker(value: SSAValue) -> Operation | None:
    """The operation whose result this is; None for an argument."""
    return value.owner if isinstance(value.owner, Operation) else None


def users(value: SSAValue) -> list[Operation]:
    """The operations that use the value, each once, in block order."""
    found = {use.operation for use in value.uses}
    if not found:
        return []
    block = next(iter(found)).parent
    assert block is not None
    return [op for op in operations(block) if op in found]


def insert_before(anchor: Operation, *new: Operation) -> None:
    assert anchor.parent is not None
    anchor.parent.insert_ops_before(list(new), anchor)


def insert_after(anchor: Operation, *new: Operation) -> None:
    assert anchor.parent is not None
    anchor.parent.insert_ops_after(list(new), anchor)


def replace(old: Operation, values: Sequence[SSAValue]) -> None:
    """Every use of a result of `old` becomes a use of the value in its place; `old` is erased."""
    for result, value in zip(old.results, values, strict=True):
        if value.name_hint is None:
            value.name_hint = result.name_hint
        result.replace_all_uses_with(value)
    erase(old)


def erase(op: Operation) -> None:
    op.detach()
    op.erase()


def precedes(first: Operation, second: Operation) -> bool:
    """Does `first` stand before `second` in their common block?"""
    op = first._next_op
    while op is not None and op is not second:
        op = op._next_op
    return op is second


def retype(value: SSAValue, type_: Attribute) -> None:
    """Give a result another type; its users are the caller's care."""
    value._type = type_  # type: ignore[attr-defined]
