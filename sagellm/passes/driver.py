"""What a pass is, and how pipelines of passes are written, built and run.

A pass rewrites a graph in place and says, as remarks, what it matched and what it declined. Patterns are methods
marked with `@rewrites(OpClass)`; one sweep over each function offers every operation to the patterns of its class.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Literal

from attrs import define, field, frozen
from xdsl.ir import Operation
from xdsl.utils.arg_spec import parse_pipeline
from xdsl.utils.exceptions import ArgSpecParseError

from sagellm.batch import Batch
from sagellm.drafts import DraftModel, Drafts
from sagellm.errors import UserError, unknown
from sagellm.ir.attrs import TableAttr
from sagellm.ir.check import describe
from sagellm.ir.edit import only_block, operations
from sagellm.ir.graph import IRGraph
from sagellm.kv.view import KVView
from sagellm.target import AttentionShape, CapabilityDescriptor, CostModel, StepCost
from sagellm.topology import TOPOLOGIES, Topology


@frozen
class Remark:
    """One thing a pass did, or left alone and why."""

    pass_name: str
    done: bool
    where: str
    message: str
    predicted: float | None = None
    """Seconds that it saves each time it runs, by the cost model; negative where it would lose."""

    def __str__(self) -> str:
        text = f"{self.pass_name}: {'applied' if self.done else 'declined'} at {self.where}: {self.message}"
        return text if self.predicted is None else f"{text} (predicted: {self.predicted * 1e6:+.1f} us)"


@frozen
class PassContext:
    """All that a pass may know besides the graph. Its fields are part of every cache key."""

    capability: CapabilityDescriptor
    costs: CostModel = field(factory=CostModel)
    ranks: int = 1
    """Ranks that run the model together."""
    topology: Topology = TOPOLOGIES["gloo"]
    """How they are joined."""
    tokens: int = 0
    """At most so many tokens are forwarded, and more than half of that; 0: any number."""
    remarks: list[Remark] = field(factory=list, eq=False)


@frozen
class StepView:
    """What a pass may see beside the columns when it decides about a step."""

    costs: CostModel = field(factory=CostModel)
    attention: AttentionShape | None = None
    """None where no model is known."""
    step: StepCost | None = None
    """What a step takes, by its tokens; None where there is no model."""
    drafts: Drafts | None = None
    """What may come next; None where nobody keeps it."""
    draft_model: DraftModel | None = None
    """A smaller model that guesses what comes next; None where there is none."""
    kv: KVView | None = None
    """The engine's KV cache; None where a batch is looked at outside one."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses are frozen dataclasses; their fields are the options."""

    optional: ClassVar[tuple[str, ...]] = ()
    """Facts without which a step computes the same: now and then they are left out, to measure what they gain."""
    uneven: ClassVar[bool] = False
    """Whether steps with these facts give now one token and now several."""
    name: ClassVar[str]
    graph: ClassVar[Literal["batch", "model"]]

    def apply(self, graph: IRGraph, context: PassContext) -> None:
        """Rewrite the graph. The default offers every operation to the patterns."""
        patterns = self._patterns()
        for function in graph:
            for op in list(operations(only_block(function))):
                for pattern in patterns.get(type(op), ()):
                    if op.parent is not None:
                        pattern(self, op, graph, context)

    def prepare(self, view: StepView) -> None:
        """Batch passes: settle what holds for all steps, before the first one."""

    def decide(self, batch: Batch, view: StepView) -> None:
        """Batch passes: write decisions about this step into the batch's columns and facts."""

    def leave_out(self, batch: Batch, fact: str) -> None:
        """Batch passes: take back what was decided with this optional fact."""
        for phase, facts in batch.facts.items():
            batch.facts[phase] = tuple(f for f in facts if f != fact)

    @classmethod
    def _patterns(cls) -> dict[type[Operation], list[Callable]]:
        table: dict[type[Operation], list[Callable]] = {}
        for klass in reversed(cls.__mro__):
            for method in vars(klass).values():
                for kind in getattr(method, "rewrites", ()):
                    table.setdefault(kind, []).append(method)
        return table

    def applied(
        self, context: PassContext, op: Operation | str, message: str, predicted: float | None = None
    ) -> None:
        where = op if isinstance(op, str) else describe(op)
        context.remarks.append(Remark(self.name, True, where, message, predicted))

    def declined(
        self, context: PassContext, op: Operation | str, message: str, predicted: float | None = None
    ) -> None:
        where = op if isinstance(op, str) else describe(op)
        context.remarks.append(Remark(self.name, False, where, message, predicted))

    def __str__(self) -> str:
        options = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                text = f'"{value}"' if isinstance(value, str) else str(value).lower()
                options.append(f"{f.name.replace('_', '-')}={text}")
        return f"{self.name}{{{' '.join(options)}}}" if options else self.name


def rewrites(*kinds: type[Operation]) -> Callable:
    """Mark a method `(self, op, graph, context)` as a pattern for operations of these classes."""

    def mark(method: Callable) -> Callable:
        method.rewrites = kinds  # type: ignore[attr-defined]
        return method

    return mark


@define
class Phase:
    """One pass of a run: the graph after it, and how long it took."""

    name: str
    graph: IRGraph
    seconds: float


class Pipeline:
    """Passes in order. The batch passes see every step's graph, the model passes each model graph once."""

    def __init__(self, passes: Sequence[Pass]):
        self.passes = tuple(passes)
        self.deciding = tuple(p for p in passes if type(p).decide is not Pass.decide)

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def prepare(self, view: StepView) -> None:
        """Every batch pass settles what holds for all steps of an engine."""
        for p in self.passes:
            p.prepare(view)

    def decide(self, batch: Batch, view: StepView) -> None:
        """Every batch pass decides about this step, anew."""
        batch.facts, batch.notes, batch.declines, batch.probes = {}, {}, {}, set()
        for p in self.deciding:
            p.decide(batch, view)

    def run(
        self,
        graph: IRGraph,
        kind: str,
        context: PassContext,
        verify: str = "weak",
        phases: list[Phase] | None = None,
    ) -> None:
        """Apply the passes for graphs of this kind. Tables are sealed meanwhile: structure must not read values."""
        tables = [a.data for op in graph.walk() for a in op.properties.values() if isinstance(a, TableAttr)]
        for p in self.passes:
            if p.graph != kind:
                continue
            began = time.perf_counter()
            for table in tables:
                table.sealed = True
            try:
                p.apply(graph, context)
            finally:
                for table in tables:
                    table.sealed = False
            took = time.perf_counter() - began
            try:
                graph.verify(verify)
            except UserError as error:
                raise UserError(f"after pass {p.name}: {error}") from error
            if phases is not None:
                phases.append(Phase(p.name, graph.clone(), took))


def parse(text: str, registry: Callable[[], dict[str, Callable[[], type[Pass]]]]) -> Pipeline:
    """`a,b{option=value}`: the text form of a pipeline, over a table of pass classes."""
    known = registry()
    passes = []
    try:
        specs = list(parse_pipeline(text)) if text.strip() else []
    except ArgSpecParseError as error:
        reason = str(error).strip().splitlines()[-1].strip(" |^-")
        raise UserError(f"pipeline {text!r}: {reason}; accepted: name,name{{option=value}},...") from error
    for spec in specs:
        if spec.name not in known:
            raise unknown("pass", spec.name, sorted(known))
        passes.append(_build(known[spec.name](), spec.parameters))
    return Pipeline(passes)


def _build(kind: type[Pass], given: dict[str, Any]) -> Pass:
    fields = {f.name.replace("_", "-"): f for f in dataclasses.fields(kind)}
    values = {}
    for name, value in given.items():
        option = fields.get(name.replace("_", "-"))
        if option is None:
            raise unknown(f"option of pass {kind.name}", name, sorted(fields))
        values[option.name] = _option(kind, option, value)
    return kind(**values)


OPTION_TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def _type_name(option: dataclasses.Field) -> str:
    """`int`, whether or not the module postpones the evaluation of annotations."""
    return option.type if isinstance(option.type, str) else option.type.__name__


def _option(kind: type[Pass], option: dataclasses.Field, values: Sequence[Any]) -> Any:
    wanted = OPTION_TYPES.get(_type_name(option))
    if wanted is None:
        raise unknown(f"type of option {option.name} of pass {kind.name}", _type_name(option), OPTION_TYPES)
    value = True if wanted is bool and not values else values[0] if len(values) == 1 else None
    if wanted is float and value is not None and not isinstance(value, bool):
        with suppress(ValueError):  # the lexer takes 1e-6 for a name
            value = float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        text = ",".join(map(str, values))
        raise UserError(f"option {option.name} of pass {kind.name} is {text!r}; accepted: {wanted.__name__}")
    return value


def options(kind: type[Pass]) -> Iterator[tuple[str, str, Any]]:
    """(name, type, default) of each option."""
    for f in dataclasses.fields(kind):
        yield f.name.replace("_", "-"), _type_name(f), f.default
