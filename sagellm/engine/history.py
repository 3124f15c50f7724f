"""The last steps and the last requests' lookups, kept to be explained: what `/debug` shows."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from attrs import asdict, define, field, frozen

from sagellm.batch import Batch, Phase
from sagellm.compiler import CompiledStep
from sagellm.engine.explain import explain_graph
from sagellm.errors import UserError, unknown
from sagellm.ir.graph import IRGraph
from sagellm.ir.lower import lower, step_graph
from sagellm.kv.prefix import Fate
from sagellm.passes.driver import Remark

if TYPE_CHECKING:
    from sagellm.engine.planner import Planner

REQUESTS_A_STEP = 4
"""Requests that are remembered for each step that is."""


@frozen
class Step:
    """What a step was; `graph` as lowered, with its tables' values."""

    number: int
    time: float
    requests: list[str]
    decodes: int
    prefills: int
    pooling: str
    forwarded: int
    operations: int
    plan_hit: bool
    seconds: float
    device_seconds: float
    remarks: list[Remark]
    graph: IRGraph

    def told(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__slots__ if name[0] != "_" and name != "graph"}
        return fields | {"remarks": [asdict(remark) for remark in self.remarks]}


@define
class History:
    """Of so many steps; none keeps nothing."""

    steps: int
    _steps: deque[Step] = field(init=False)
    _lookups: OrderedDict[str, list[Fate]] = field(factory=OrderedDict)

    def __attrs_post_init__(self) -> None:
        self._steps = deque(maxlen=self.steps)

    def lowered(self, planner: Planner, batch: Batch) -> IRGraph:
        """The step's graph with its tables' values, as they are before the step runs."""
        graph = step_graph(lower(batch, planner.model.vocab_size))
        graph.text(tables=True)
        return graph

    def add(
        self, planner: Planner, batch: Batch, graph: IRGraph, compiled: CompiledStep, requests: Iterable[str],
        number: int, forwarded: int, plan_hit: bool, seconds: float, device_seconds: float,
    ) -> None:  # fmt: skip
        said = [
            Remark(name, done, "this batch", note)
            for done, notes in ((True, batch.notes), (False, batch.declines))
            for name, note in notes.items()
        ]
        counts = (len(batch.rows(phase)) for phase in Phase)
        self._steps.append(
            Step(
                number, time.time(), list(dict.fromkeys(requests)), *counts, batch.pooling, forwarded,
                len(compiled.plan.calls), plan_hit, seconds, device_seconds, [*compiled.remarks, *said], graph,
            )
        )  # fmt: skip

    def looked_up(self, request: str, fates: list[Fate]) -> None:
        """What a request found in the cache when it began, or went on."""
        self._lookups[request] = fates
        self._lookups.move_to_end(request)
        while len(self._lookups) > REQUESTS_A_STEP * self.steps:
            self._lookups.popitem(last=False)

    # what is asked

    def all(self) -> list[dict[str, Any]]:
        """The steps, the last one first."""
        self._check()
        return [step.told() for step in reversed(self._steps)]

    def step(self, planner: Planner, number: int) -> dict[str, Any]:
        """One of them, with what became of its graph and of its model's, pass by pass."""
        step = self._find(number)
        explained = explain_graph(planner, step.graph, step.forwarded)
        phases = [
            {"name": phase.name, "operations": sum(1 for _ in phase.graph.walk()), "seconds": phase.seconds}
            for phase in explained.phases
        ]
        return step.told() | {"phases": phases}

    def ir(self, planner: Planner, number: int, after: str) -> str:
        """The step's graph, or its model's, as text behind a pass; by default the step's behind all."""
        step = self._find(number)
        explained = explain_graph(planner, step.graph, step.forwarded)
        phases = {phase.name: phase.graph for phase in explained.phases}
        if not after:
            after = [phase.name for phase in explained.phases[: explained.batch_phases]][-1]
        if after not in phases:
            raise unknown("pass", after, phases)
        return phases[after].text(tables=after == "lowered")

    def lookup(self, request: str) -> list[dict[str, Any]]:
        """Block by block: was it in the cache, and why not."""
        self._check()
        if request not in self._lookups:
            raise UserError(f"request {request!r} is not among the last; accepted: a later one")
        return [{"block": i, "found": f.found, "why": f.why} for i, f in enumerate(self._lookups[request])]

    def _find(self, number: int) -> Step:
        self._check()
        found = next((step for step in self._steps if step.number == number), None)
        if found is None:
            known = f"{self._steps[0].number} to {self._steps[-1].number}" if self._steps else "none yet"
            raise UserError(f"step {number} is not kept; accepted: {known}")
        return found

    def _check(self) -> None:
        if not self.steps:
            raise UserError("nothing is kept; accepted: an engine whose explain_steps is above 0")
