"""What a function of the model graph is predicted to take: each operation on one of two lanes, compute and network.

Operations start in their order. A collective that stands for itself keeps the compute lane waiting; `comm.start` does
not, and `comm.wait` waits for what is left. `comm.linear_all_reduce` counts as a product and then a sum: what its
kernel hides of the one behind the other is not known. Attention counts the step's own tokens: a graph does not know
what is cached.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import networkx
from attrs import define, field, frozen
from xdsl.dialects.builtin import DYNAMIC_INDEX, TensorType
from xdsl.ir import Block, Operation, SSAValue

from sagellm.ir.attrs import RowsType, dtype_name, last_dim, shape_of
from sagellm.ir.dialects import comm, nn
from sagellm.ir.edit import only_block, operations, users
from sagellm.ir.graph import IRGraph, dependences
from sagellm.schemas import DTYPE_BYTES
from sagellm.target import CostModel
from sagellm.topology import Topology

COMPUTE, NETWORK = "compute", "network"


@frozen
class Span:
    """An operation on a lane; seconds."""

    lane: str
    name: str
    start: float
    end: float


@frozen
class Machine:
    """What a prediction is about: one rank's device, the network between the ranks, and so many tokens."""

    costs: CostModel
    topology: Topology
    ranks: int
    tokens: int
    """Forwarded by a step."""
    outputs: int | None = None
    """Rows whose logits are wanted; None: every token's."""

    @classmethod
    def of(
        cls, costs: CostModel, topology: Topology, ranks: int, tokens: int, outputs: int | None = None
    ) -> Machine:
        """With the costs of the topology's devices, where it says them; `costs` are the backend's."""
        if topology.costs is not None:
            costs = topology.costs
        elif topology.one_device:
            costs = costs.part(ranks)
        return cls(costs, topology, ranks, tokens, outputs)

    def compute(self, op: Operation, rows: Mapping[SSAValue, int]) -> float:
        """Seconds on the compute lane; `rows` are the values' token counts."""
        match op:
            case comm.Wait() | nn.Return() | nn.Call() | nn.Repeat():
                return 0.0
            case comm.Start() | nn.SplitRows() | nn.Split():
                return self.costs.call
            case nn.Linear() | comm.LinearAllReduce():
                return self.costs.product(
                    rows[op.result], last_dim(op.x.type), last_dim(op.result.type), dtype_name(op.result.type)
                )
            case nn.Attention():
                width, size = last_dim(op.q.type), DTYPE_BYTES[dtype_name(op.q.type)]
                tokens = rows[op.result]
                keys = 2 * op.kv_heads.value.data * op.head_dim.value.data
                seen = (
                    1
                    if isinstance(rows_type := op.rows.type, RowsType) and "prefill" not in rows_type.data
                    else tokens
                )
                return self.costs.seconds(
                    flops=2 * tokens * seen * width,
                    moved=size * tokens * (2 * width + keys),
                    dtype=dtype_name(op.q.type),
                )
        if op.name in _NAMES:
            return 0.0
        return self.costs.seconds(moved=sum(_bytes(value, rows) for value in chain(op.operands, op.results)))

    def network(self, op: Operation, rows: Mapping[SSAValue, int]) -> float:
        """Seconds on the network lane: 0 for what is no collective."""
        kind = op.collective.data if isinstance(op, comm.Start) else _NAMES.get(op.name)
        if kind is None:
            return 0.0
        value = op.results[0] if isinstance(op, (comm.Recv, comm.LinearAllReduce)) else op.operands[0]
        return self.topology.seconds(kind, _bytes(value, rows), self.ranks)

    def rows(self, block: Block) -> dict[SSAValue, int]:
        """Token counts of the tensors in a block."""
        counts: dict[SSAValue, int] = dict.fromkeys(block.args, self.tokens)
        for op in operations(block):
            first = next((counts[value] for value in op.operands if value in counts), self.tokens)
            match op:
                case nn.SplitRows():
                    counts[op.first], counts[op.second] = (first + 1) // 2, first // 2
                    continue
                case nn.JoinRows():
                    first += counts[op.second]
                case nn.SelectOutputs() if self.outputs is not None:
                    first = self.outputs
            counts.update(dict.fromkeys(op.results, first))
        return counts


_NAMES = {f"comm.{kind}": kind for kind in (*comm.COLLECTIVES, "send", "recv")} | {
    "comm.linear_all_reduce": "all_reduce"
}


def _bytes(value: SSAValue, rows: Mapping[SSAValue, int]) -> float:
    if not isinstance(value.type, TensorType):
        return 0.0
    fixed = math.prod(size for size in shape_of(value.type) if size != DYNAMIC_INDEX)
    return rows[value] * fixed * DTYPE_BYTES.get(dtype_name(value.type), 8)


@define
class _Lanes:
    """Where the two lanes are; `ends` says when each collective that was started is done."""

    machine: Machine
    now: float = 0.0
    busy: float = 0.0
    """When the network is free."""
    ends: dict[SSAValue, float] = field(factory=dict)

    def ready(self, op: Operation) -> float:
        """When the compute lane could go on with it."""
        return max(self.now, self.ends[op.pending]) if isinstance(op, comm.Wait) else self.now

    def run(self, op: Operation, rows: Mapping[SSAValue, int]) -> Iterator[Span]:
        begin, work = self.ready(op), self.machine.compute(op, rows)
        beside = min(work * self.machine.topology.slowdown.value, max(0.0, self.busy - begin))
        self.now = begin + beside + (work - beside / self.machine.topology.slowdown.value)
        if self.now > begin:
            yield Span(COMPUTE, _label(op), begin, self.now)
        if network := self.machine.network(op, rows):
            start = max(self.now, self.busy)
            self.busy = start + network
            yield Span(NETWORK, _network_label(op), start, self.busy)
            if isinstance(op, comm.Start):
                self.ends[op.result] = self.busy
            else:
                self.now = self.busy
        elif isinstance(op, comm.Start):
            self.ends[op.result] = self.now


def _label(op: Operation) -> str:
    names = ", ".join(f"%{result.name_hint}" for result in op.results if result.name_hint)
    return f"{names} = {op.name}" if names else op.name


def _network_label(op: Operation) -> str:
    """A collective that was begun is called as if it stood for itself, by the name of what its wait gives."""
    if not isinstance(op, comm.Start):
        return _label(op)
    waits = [user for user in users(op.result) if isinstance(user, comm.Wait)]
    name = waits[0].result.name_hint if waits else None
    return f"{f'%{name} = ' if name else ''}comm.{op.collective.data}"


def simulate(block: Block, machine: Machine) -> list[Span]:
    """The lanes of a block from 0 on."""
    lanes, rows = _Lanes(machine), machine.rows(block)
    return [span for op in operations(block) for span in lanes.run(op, rows)]


def seconds(spans: Iterable[Span]) -> float:
    """When the last of them ends."""
    return max((span.end for span in spans), default=0.0)


def list_schedule(block: Block, machine: Machine, *, network_first: bool = False) -> list[Operation]:
    """The operations in an order that keeps both lanes busy.

    Of those whose dependences are done, the one that can go on first; what starts a collective before others; then the
    one with the longest way to the end (Graham 1966, Hu 1961), or with `network_first` the one with the shortest way to
    a collective.
    """
    graph, rows = dependences(block), machine.rows(block)
    urgent: dict = {}
    for node in reversed(list(networkx.topological_sort(graph))):
        work = machine.compute(node.op, rows)
        behind = [urgent[other] for other in graph.successors(node)]
        if not network_first:
            urgent[node] = max(behind, default=0.0) + work + machine.network(node.op, rows)
        else:
            urgent[node] = 0.0 if isinstance(node.op, comm.Start) else max(behind, default=-math.inf) - work
    waiting = {node: len(set(graph.predecessors(node))) for node in graph}
    ready = [node for node, count in waiting.items() if count == 0]
    lanes, order = _Lanes(machine), []
    while ready:
        last = len(ready) == 1
        node = min(
            (node for node in ready if last or not isinstance(node.op, nn.Return)),
            key=lambda n: (lanes.ready(n.op), not isinstance(n.op, comm.Start), -urgent[n], n.index),
        )
        ready.remove(node)
        order.append(node.op)
        list(lanes.run(node.op, rows))
        for other in set(graph.successors(node)):
            waiting[other] -= 1
            if waiting[other] == 0:
                ready.append(other)
    return order


@frozen
class Part:
    """A function of the model graph in a timeline, called `count` times in a row."""

    name: str
    count: int
    spans: list[Span]

    @property
    def seconds(self) -> float:
        return seconds(self.spans)

    def busy(self, lane: str) -> float:
        """Seconds of one call in which the lane works."""
        return sum(span.end - span.start for span in self.spans if span.lane == lane)

    @property
    def exposed(self) -> float:
        """Seconds of one call in which nothing is computed: the network, as far as it is not hidden."""
        return self.seconds - self.busy(COMPUTE)


def predict(graph: IRGraph, machine: Machine) -> list[Part]:
    """The functions that `@model` calls, in order."""
    parts = []
    functions = graph.functions
    for op in operations(only_block(functions["model"])):
        if isinstance(op, (nn.Call, nn.Repeat)):
            name = op.callee.root_reference.data
            count = op.count.value.data if isinstance(op, nn.Repeat) else 1
            parts.append(Part(name, count, simulate(only_block(functions[name]), machine)))
    return parts


def total(parts: Iterable[Part]) -> float:
    """Seconds of the whole step's model."""
    return sum(part.count * part.seconds for part in parts)
