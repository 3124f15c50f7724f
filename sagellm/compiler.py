"""From a batch to its plan: lower, find by fingerprint, or run the passes and emit. Caches and dumps live here."""

from __future__ import annotations

from attrs import define, field, frozen

from sagellm.backends.base import Backend
from sagellm.backends.plan import ExecutionPlan, Program
from sagellm.backends.step import emit_step
from sagellm.batch import Batch
from sagellm.errors import UserError
from sagellm.ir.dialects import weights
from sagellm.ir.edit import only_block, operations
from sagellm.ir.graph import IRGraph, fingerprint
from sagellm.ir.lower import bucket, lower, step_graph
from sagellm.models.config import ModelConfig
from sagellm.models.decoder import build_embedder, build_model, build_sampler
from sagellm.passes.driver import PassContext, Phase, Pipeline, Remark
from sagellm.topology import TOPOLOGIES, Topology


@define
class CacheCounts:
    """How often a step's plan was found."""

    hits: int = 0
    misses: int = 0


@frozen
class CompiledModel:
    """A model graph for one kind of rows, after the passes."""

    graph: IRGraph
    program: Program
    remarks: list[Remark]


@frozen
class CompiledStep:
    """A step's plan, and what the passes said when it was made."""

    plan: ExecutionPlan
    remarks: list[Remark]


@define
class Compiler:
    """Compiles for one model, one backend and one pipeline; all its caches are valid for exactly these."""

    config: ModelConfig
    backend: Backend
    pipeline: Pipeline
    dtype: str
    verify: str = "weak"
    ranks: int = 1
    """Ranks that run the model together."""
    topology: Topology = TOPOLOGIES["gloo"]
    kv_dtype: str | None = None
    """A small type that the cache holds keys and values in; None: as they are computed."""
    counts: CacheCounts = field(factory=CacheCounts)
    _steps: dict[tuple, CompiledStep] = field(factory=dict)
    _models: dict[tuple[tuple[str, ...], int], CompiledModel] = field(factory=dict)
    _embedders: dict[tuple[tuple[str, ...], str], CompiledModel] = field(factory=dict)
    _samplers: dict[tuple[str, ...], Program] = field(factory=dict)

    def step(self, batch: Batch) -> CompiledStep:
        """The plan of a batch whose passes have decided. Lowering happens every time, compiling on a miss."""
        block = lower(batch, self.config.vocab_size)
        key = fingerprint(block)
        found = self._steps.get(key)
        if found is not None:
            self.counts.hits += 1
            return found
        self.counts.misses += 1
        graph, remarks = self.compile_step(step_graph(block))
        found = self._steps[key] = CompiledStep(emit_step(only_block(graph.step)), remarks)
        return found

    def context(self, tokens: int = 0) -> PassContext:
        """What the passes may know; `tokens` that are forwarded, where they are known."""
        return PassContext(self.backend.capability, self.backend.costs, self.ranks, self.topology, tokens)

    def compile_step(self, graph: IRGraph, phases: list[Phase] | None = None) -> tuple[IRGraph, list[Remark]]:
        """Run the batch passes over a step's graph, in place."""
        context = self.context()
        self.pipeline.run(graph, "batch", context, self.verify, phases)
        return graph, context.remarks

    def model(self, kinds: tuple[str, ...], tokens: int = 0) -> CompiledModel:
        """The model graph for rows of these kinds; compiled on first use.

        For several ranks there is one for every power of two of tokens, as what pays depends on the messages' size.
        """
        size = bucket(tokens) if self.ranks > 1 else 0
        found = self._models.get((kinds, size))
        if found is None:
            graph = build_model(self.config, self.dtype, kinds, self.kv_dtype)
            found = self._models[kinds, size] = self.compile_model(graph, kinds, size)
        return found

    def embedder(self, kinds: tuple[str, ...], pooling: str) -> CompiledModel:
        """The model without its head, which gives a vector for each sequence; compiled on first use."""
        found = self._embedders.get((kinds, pooling))
        if found is None:
            graph = build_embedder(self.config, self.dtype, kinds, pooling, self.kv_dtype)
            found = self._embedders[kinds, pooling] = self.compile_model(graph, kinds)
        return found

    def compile_model(
        self, graph: IRGraph, kinds: tuple[str, ...], tokens: int = 0, phases: list[Phase] | None = None
    ) -> CompiledModel:
        """Run the model passes over a model graph, in place, and emit it."""
        context = self.context(tokens)
        self.pipeline.run(graph, "model", context, self.verify, phases)
        if graph.kv_dtype != self.kv_dtype:
            raise UserError(
                f"pipeline {self.pipeline} leaves kv_dtype {graph.kv_dtype!r}; accepted: {self.kv_dtype!r}, the cache's"
            )
        program = self.backend.emit(graph, f"{self.config.name} {'+'.join(kinds)}")
        return CompiledModel(graph, program, context.remarks)

    def sampler(self, stages: tuple[str, ...]) -> Program:
        """`sample(logits, how)` with these stages; compiled on first use."""
        found = self._samplers.get(stages)
        if found is None:
            graph = build_sampler(self.config.vocab_size, stages)
            self.pipeline.run(graph, "model", self.context(), self.verify)
            found = self._samplers[stages] = self.backend.emit(
                graph, f"sampler {'+'.join(stages) or 'greedy'}"
            )
        return found


def expected_tensors(graph: IRGraph) -> dict[str, tuple[int, ...]]:
    """Checkpoint tensors that the weights program reads, with their shapes."""
    expected: dict[str, tuple[int, ...]] = {}
    for load in graph.loads.values():
        first, count = load.first.value.data, load.count.value.data
        for op in operations(only_block(load)):
            if not isinstance(op, weights.Tensor):
                continue
            shape = op.source_shape
            for layer in range(first, first + count):
                expected[tensor_name(op, layer, layer == first + count - 1)] = shape
    return expected


def tensor_name(op: weights.Tensor, layer: int, last: bool) -> str:
    """The checkpoint's name of a tensor for one layer."""
    if last and op.last is not None:
        return op.last.data
    try:
        return op.source.data.replace("{layer+1}", str(layer + 1)).format(layer=layer)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"weights.tensor {op.source.data!r}; accepted: {{layer}} and {{layer+1}}") from error
