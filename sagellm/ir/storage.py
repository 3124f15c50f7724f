"""May a kernel write its result over one of its operands? Values are never changed in the graph; kernels do it."""

from __future__ import annotations

from xdsl.ir import BlockArgument, Operation, SSAValue

from sagellm.ir.dialects import comm, nn
from sagellm.ir.edit import maker, only_block, operations, parent_function, precedes, symbol_name, users

VIEWS = (nn.Split, nn.SplitRows)
"""Their results are parts of their operand's memory, none of which overlap."""
SAME = (nn.Cast, comm.AllReduce, comm.AllGather, comm.ReduceScatter, comm.Start, comm.Wait)
"""Their result may lie where their operand does."""


def overwritable(value: SSAValue, op: Operation) -> bool:
    """Whether nobody reads the memory of this operand of `op` once `op` has run.

    Nobody: no later operation, no caller of the function, no next turn of a loop, and no other operand of `op`.
    """
    if sum(operand is value for operand in op.operands) > 1:
        return False
    through = op
    while True:
        others = (user for user in users(value) if user is not through)
        if not all(precedes(reader, op) for user in others for reader in _readers(user)):
            return False
        source = maker(value)
        if isinstance(value, BlockArgument):
            return _callers_are_done(value)
        if isinstance(source, (nn.Call, nn.Repeat)):
            return _gives_memory_of_its_own(_callee(source))
        if not isinstance(source, (*VIEWS, *SAME)):
            return True
        through, value = source, source.operands[0]


def _readers(user: Operation) -> list[Operation]:
    """The operation, and those that read what it passes on of its operand's memory."""
    found = [user]
    if isinstance(user, (*VIEWS, *SAME)):
        found += [reader for result in user.results for other in users(result) for reader in _readers(other)]
    return found


def _callers_are_done(argument: BlockArgument) -> bool:
    function = argument.block.parent_op()
    assert function is not None
    callers = [call for call in _calls(function) if _callee(call) is function]
    for call in callers:
        if isinstance(call, nn.Repeat):
            carried = argument.index < len(call.results)
            if not carried or not _gives_memory_of_its_own(function):
                return False
        if not overwritable(call.operands[argument.index], call):
            return False
    return bool(callers)


def _gives_memory_of_its_own(function: Operation) -> bool:
    """Whether what the function returns lies apart, and is none of its arguments."""
    returned = only_block(function).last_op
    assert returned is not None
    roots = [_root(value) for value in returned.operands]
    return len(set(roots)) == len(roots) and not any(isinstance(root, BlockArgument) for root in roots)


def _root(value: SSAValue) -> SSAValue:
    while isinstance(source := maker(value), (*VIEWS, *SAME)):
        value = source.operands[0]
    return value


def _calls(function: Operation) -> list[nn.Call | nn.Repeat]:
    """All calls in the function's module."""
    module = function.parent
    assert module is not None
    functions = [other for other in operations(module) if isinstance(other, nn.Func)]
    return [op for f in functions for op in operations(only_block(f)) if isinstance(op, (nn.Call, nn.Repeat))]


def _callee(call: nn.Call | nn.Repeat) -> Operation:
    module = parent_function(call).parent
    assert module is not None
    name = call.callee.root_reference.data
    return next(f for f in operations(module) if isinstance(f, nn.Func) and symbol_name(f) == name)
