"""Collectives run while something else is computed, where the prediction says that it pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal

import networkx
from xdsl.ir import Block, Operation, SSAValue

from sagellm import topology
from sagellm.ir.build import created, properties
from sagellm.ir.check import describe
from sagellm.ir.dialects import comm, nn
from sagellm.ir.edit import erase, insert_after, insert_before, maker, only_block, operations, replace
from sagellm.ir.graph import IRGraph
from sagellm.ir.timeline import Machine, list_schedule, seconds, simulate
from sagellm.passes.driver import Pass, PassContext

BY_ROW = (
    nn.Linear, nn.RmsNorm, nn.Add, nn.AddRmsNorm, nn.Quantize, nn.RmsNormQuantize, nn.AddRmsNormQuantize, nn.Silu,
    nn.Mul, nn.SiluMul, nn.Split, nn.Cast, comm.AllReduce, comm.LinearAllReduce,
)  # fmt: skip
"""Operations that do the same to each token, whatever the others are."""
NEEDED = {"comm.start", "comm.wait", "nn.split_rows", "nn.join_rows"}
MARGIN = 0.01
"""Part of a function's time that a gain must be: what is less, a prediction cannot tell."""
COLLECTIVES = (*comm.COLLECTIVES.values(), comm.LinearAllReduce)


@dataclass(frozen=True)
class CommComputeOverlap(Pass):
    """Cuts collectives into start and wait and orders a function's operations so that others run between: by list
    scheduling on its dependences, with the costs of the device and of the network. Where that pays more, what is done
    token by token around the collectives is done for each half of the tokens, so that one half is computed while the
    other is on its way (TokenWeave, Gond et al. 2025; NanoFlow, Zhu et al. 2024). The weights are then read twice.
    A product that was fused with its sum is taken apart for it, and stays fused where this declines.

    Declines where neither is predicted to be faster for all numbers of tokens that the graph is made for, such as small
    messages, where that number is not known, and where the backend cannot begin a collective.
    """

    tokens: int = 0
    """0: as many as the graph is made for."""
    ranks: int = 0
    """0: as many as the engine has."""
    topology: str = ""
    """Empty: that of the backend."""

    name: ClassVar[str] = "comm-compute-overlap"
    graph: ClassVar[Literal["model"]] = "model"

    def apply(self, graph: IRGraph, context: PassContext) -> None:
        ranks = self.ranks or max(context.ranks, graph.ranks)
        most = self.tokens or context.tokens
        joined = topology.find(self.topology) if self.topology else context.topology
        machines = [Machine.of(context.costs, joined, ranks, n) for n in (most, most // 2 + 1)]
        for function in graph.functions.values():
            found = [op for op in operations(only_block(function)) if isinstance(op, COLLECTIVES)]
            if not found:
                continue
            if reason := self._impossible(context, function, ranks, most):
                self.declined(context, found[0], reason)
                continue
            self._faster(function, found, machines, context)

    def _impossible(self, context: PassContext, function: nn.Func, ranks: int, tokens: int) -> str:
        if missing := NEEDED - context.capability.kernels:
            return f"{context.capability.backend} has no {min(missing)}"
        if any(isinstance(op, nn.SelectOutputs) for op in operations(only_block(function))):
            return "how many rows have outputs is not known"
        if ranks < 2:
            return "how many ranks there are is not known"
        if not tokens:
            return "how many tokens are forwarded is not known"
        return ""

    def _faster(
        self, function: nn.Func, found: Sequence[Operation], machines: list[Machine], context: PassContext
    ) -> None:
        """Replace the function by the fastest of its variants, if one is faster than it."""
        before = [seconds(simulate(only_block(function), machine)) for machine in machines]
        variants = []
        fewest = machines[-1].tokens
        for halves, network_first in product((False, fewest > 1), (False, True)):
            variant = function.clone()
            block = only_block(variant)
            if halves:
                halve(block)
            begin_early(block)
            reorder(block, list_schedule(block, machines[0], network_first=network_first))
            variants.append(([seconds(simulate(block, machine)) for machine in machines], halves, variant))
        after, halves, best = min(variants, key=lambda variant: variant[0][0])
        machine, where = machines[0], describe(found[0])
        each = machine.network(found[0], machine.rows(only_block(function)))
        what = f"{machine.tokens} tokens, {len(found)} x {each * 1e6:.1f} us on {machine.topology.name}"
        how = "in two halves" if halves else "begun early"
        message = f"{what}: {before[0] * 1e6:.1f} us; {how} {after[0] * 1e6:.1f} us"
        gain = min(one - other for one, other in zip(before, after))
        if gain < MARGIN * before[0]:
            self.declined(context, where, message, gain)
            return
        insert_before(function, best)
        erase(function)
        self.applied(context, where, message, gain)


def halve(block: Block) -> None:
    """Everything that is done token by token and hangs together with a collective is done twice, for half of them."""
    chosen = _around_collectives(block)
    halves: dict[SSAValue, tuple[SSAValue, SSAValue]] = {}
    for op in list(operations(block)):
        if op in chosen:
            for value in op.operands:
                if value not in halves:
                    split = nn.SplitRows.create(operands=[value], result_types=[value.type] * 2)
                    _name(split, value)
                    insert_before(op, split)
                    halves[value] = split.first, split.second
            pair = [op.clone({value: halves[value][half] for value in op.operands}) for half in (0, 1)]
            insert_before(op, *pair)
            for result, one, other in zip(op.results, *(made.results for made in pair)):
                halves[result] = one, other
                one.name_hint, other.name_hint = (f"{result.name_hint or 'v'}_{half}" for half in "ab")
        else:
            for value in op.operands:
                if value in halves and maker(value) in chosen:
                    join = nn.JoinRows.create(operands=halves[value], result_types=[value.type])
                    join.result.name_hint = value.name_hint
                    insert_before(op, join)
                    value.replace_uses_with_if(join.result, lambda use: use.operation not in chosen)
    for op in reversed(list(operations(block))):
        if op in chosen:
            erase(op)


def _name(split: nn.SplitRows, value: SSAValue) -> None:
    for half, result in zip("ab", split.results):
        result.name_hint = f"{value.name_hint or 'v'}_{half}"


def _around_collectives(block: Block) -> set[Operation]:
    """The operations that act row by row and are joined with a collective by values that only such operations make."""
    joined = networkx.Graph()
    for op in operations(block):
        if isinstance(op, BY_ROW):
            joined.add_node(op)
            for value in op.operands:
                if isinstance(source := maker(value), BY_ROW):
                    joined.add_edge(source, op)
    return {
        op
        for component in networkx.connected_components(joined)
        if any(isinstance(op, COLLECTIVES) for op in component)
        for op in component
    }


def begin_early(block: Block) -> None:
    """Each collective becomes a start and a wait."""
    for op in list(operations(block)):
        if isinstance(op, COLLECTIVES):
            if isinstance(op, comm.LinearAllReduce):
                op = _apart(op)
            kind = op.name.removeprefix("comm.")
            start = comm.Start.create(
                operands=op.operands,
                result_types=[comm.PendingType(())],
                properties=properties({"collective": kind, **op.properties}),
            )
            wait = comm.Wait.create(operands=[start.result], result_types=op.result_types)
            insert_after(op, created(start), wait)
            replace(op, [wait.result])


def _apart(op: comm.LinearAllReduce) -> comm.AllReduce:
    """A product, and its sum."""
    product = nn.Linear.create(
        operands=op.operands, result_types=op.result_types, properties={"weight": op.weight}
    )
    total = comm.AllReduce.create(
        operands=[product.results[0]], result_types=op.result_types, properties={"group": op.group}
    )
    insert_before(op, created(product), total)
    replace(op, [total.result])
    return total


def reorder(block: Block, order: list[Operation]) -> None:
    for op in order:
        op.detach()
        block.add_op(op)
