"""Does a pass keep the meaning of a graph? Both graphs are evaluated by `sagellm.ir.reference` and compared.

Everything is evaluated in float32. Two tensors agree when they differ by at most TOLERANCE times the greatest magnitude
in the one before the pass (or times 1, where all are smaller); not to the last bit, since a merged matrix product may
sum in another order. Model graphs are checked with two layers of every segment, since its layers are equal.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from attrs import evolve, frozen
from torch import Tensor
from xdsl.ir import Operation

from sagellm.batch import Batch, Phase
from sagellm.errors import UserError
from sagellm.ir.check import describe
from sagellm.ir.dialects import batch as b
from sagellm.ir.graph import IRGraph
from sagellm.ir.lower import bucket, lower, step_graph
from sagellm.ir.reference import (
    Cache,
    LogicalRows,
    StepResult,
    Weights,
    evaluate_step,
    evaluate_weights,
)
from sagellm.ir.reference.ranks import evaluate_ranks, shard_cache, whole_cache
from sagellm.meaning.inputs import (
    Read,
    cache_before,
    context_cache,
    random_tensors,
    shortened,
    small_rows,
    vocab_size,
)
from sagellm.models.decoder import build_model, build_sampler
from sagellm.passes import pipeline as pipeline_of
from sagellm.passes.driver import Pass, PassContext, Pipeline, StepView

if TYPE_CHECKING:
    from sagellm.engine.planner import Planner

TOLERANCE = 1e-5


class MeaningChanged(UserError):
    """A pass changed what a graph computes: one line with the pass, the first difference and its size."""


def check_pass(
    which: str | Pass,
    graph: IRGraph,
    context: PassContext,
    batch: Batch | None = None,
    model: IRGraph | None = None,
) -> None:
    """Check one pass, by name or made already. A batch pass needs the step's batch and a model graph."""
    pipeline = pipeline_of(which) if isinstance(which, str) else Pipeline([which])
    if all(p.graph == "model" for p in pipeline.passes):
        return check_model_passes(graph, pipeline, context)
    if batch is None or model is None:
        raise UserError(
            f"{pipeline} rewrites a step's graph; accepted: with the step's batch and a model graph"
        )
    return check_batch_passes(graph, pipeline, context, batch, model)


def check_pipeline(pipeline: Pipeline, context: PassContext, model: IRGraph, batch: Batch) -> None:
    """Check all passes, on a model graph and on a batch about which the pipeline decides here."""
    check_model_passes(model, pipeline, context)
    pipeline.decide(batch, StepView(context.costs))
    step = step_graph(lower(batch, vocab_size(model)))
    check_batch_passes(step, pipeline, context, batch, model)


def check_batch(planner: Planner, batch: Batch) -> str:
    """Check all passes of an engine on a batch about which they decided. Gives one line on what was compared."""
    pipeline, context = planner.pipeline, planner.compiler.context(bucket(batch.forwarded))
    phases = tuple(phase.name.lower() for phase in Phase if len(batch.rows(phase)))
    model = build_model(planner.model, planner.dtype, phases, planner.compiler.kv_dtype)
    check_model_passes(model, pipeline, context)
    step = step_graph(lower(batch, vocab_size(model)))
    check_batch_passes(step, pipeline, context, batch, model)
    checked = ", ".join(p.name for p in pipeline.passes) or "no pass"
    return f"verified: {checked}: equal tokens, logits and KV cache within {TOLERANCE:g}"


def check_model_passes(
    graph: IRGraph,
    pipeline: Pipeline,
    context: PassContext,
    *,
    read: Read | None = None,
    rows: LogicalRows | None = None,
) -> None:
    """Raise `MeaningChanged` where a model pass changes the logits or the KV cache. The graph itself stays as it is.

    `read` gives tensors of the checkpoint, random ones by default; `rows` are forwarded, `small_rows` by default.
    """
    graph = shortened(graph)
    read = read or random_tensors(graph)
    rows = rows or small_rows(graph)
    start = cache_before(graph, evaluate_weights(graph, read, exact=True), rows)
    whole = graph.kv_heads
    before = _evaluated(graph, read, rows, start, whole)
    for p in _of_kind(pipeline, "model"):
        graph = _applied(p, graph, context)
        try:
            after = _evaluated(graph, read, rows, start, whole)
        except Exception as error:
            raise _no_meaning(p, error) from error
        _compare_models(p, before, after)
        before = after


def check_batch_passes(
    step: IRGraph,
    pipeline: Pipeline,
    context: PassContext,
    batch: Batch,
    model: IRGraph,
    *,
    read: Read | None = None,
) -> None:
    """Raise `MeaningChanged` where a batch pass changes a step's logits, tokens or KV cache.

    `step` is the batch's graph after the passes' `decide` and before their `apply`; it stays as it is. `model` is a
    model graph; where it has no `@sample`, one is made for the stages of the step.
    """
    model = _with_sampler(shortened(model), step)
    weights = evaluate_weights(model, read or random_tensors(model), exact=True)
    start = context_cache(model, weights, batch)
    before = evaluate_step(step, model, weights, batch, start, exact=True)
    for p in _of_kind(pipeline, "batch"):
        step = _applied(p, step, context)
        try:
            after = evaluate_step(step, model, weights, batch, start, exact=True)
        except Exception as error:
            raise _no_meaning(p, error) from error
        _compare_steps(p, _gone_on(model, weights, batch, before, after), after)
        before = after


def _gone_on(
    model: IRGraph, weights: Weights, batch: Batch, before: StepResult, after: StepResult
) -> StepResult:
    """What was before the pass, after as many plain steps as sequences got tokens more by the pass."""
    c = copy.deepcopy(batch.columns)
    more, cache = dict(before.more), before.cache
    while rows := [row for row, tokens in after.more.items() if len(more.get(row, ())) < len(tokens)]:
        for row in rows:
            known = batch.columns.length[row]
            tokens = (before.tokens[row], *more.get(row, ()))
            c.tokens[row, known : known + len(tokens)] = tokens
            c.length[row], c.new[row], c.drafted[row] = known + len(tokens), 1, 0
            c.context[row] = c.length[row] - 1
        plain = Batch(c, np.array(rows), np.zeros(0, np.int64))
        graph = step_graph(lower(plain, vocab_size(model)))
        done = evaluate_step(graph, model, weights, plain, cache, exact=True)
        cache = done.cache
        more |= {row: (*more.get(row, ()), token) for row, token in done.tokens.items()}
    return evolve(before, more=more, cache=cache)


def _of_kind(pipeline: Pipeline, kind: str) -> list[Pass]:
    return [p for p in pipeline.passes if p.graph == kind]


def _applied(p: Pass, graph: IRGraph, context: PassContext) -> IRGraph:
    graph = graph.clone()
    Pipeline([p]).run(graph, p.graph, evolve(context, remarks=[]), verify="full")
    return graph


def _with_sampler(model: IRGraph, step: IRGraph) -> IRGraph:
    sampling = next((op for op in step.walk() if isinstance(op, b.Sampling)), None)
    if sampling is None or "sample" in model.functions:
        return model
    return model.merged(build_sampler(vocab_size(model), sampling.result.type.data))


@frozen
class _Value:
    """A result of an operation of the model graph."""

    op: Operation
    name: str | None
    layer: int | None
    tensor: Tensor

    def comparable(self, other: _Value) -> bool:
        """Of the same function, layer and shape?"""
        one, two = (v.op.parent_op().properties["sym_name"] for v in (self, other))
        return one == two and self.layer == other.layer and self.tensor.shape == other.tensor.shape


@frozen
class _Evaluated:
    logits: Tensor
    cache: Cache
    values: list[_Value]


def _evaluated(graph: IRGraph, read: Read, rows: LogicalRows, start: Cache, heads: int) -> _Evaluated:
    """`start` is a cache of `heads` KV heads. A graph for several ranks is evaluated on all of them."""
    values: list[_Value] = []

    def observe(op: Operation, layer: int | None, results: tuple) -> None:
        values.extend(_Value(op, r.name_hint, layer, tensor) for r, tensor in zip(op.results, results))

    ranks = graph.ranks
    weights = [evaluate_weights(graph, read, exact=True, rank=rank, ranks=ranks) for rank in range(ranks)]
    caches = shard_cache(start, graph.kv_heads, ranks)
    logits = evaluate_ranks(graph, weights, rows, caches, exact=True, observe=observe)
    if any(not torch.equal(logits[0], other) for other in logits):
        raise UserError("the ranks have different logits")
    return _Evaluated(logits[0], whole_cache(caches, heads), values)


def _compare_models(p: Pass, before: _Evaluated, after: _Evaluated) -> None:
    outputs = [("the logits", before.logits, after.logits), *_cached(before.cache, after.cache)]
    for what, one, other in outputs:
        if not _close(one, other):
            raise _first_difference(p, before, after) or _changed(p, what, one, other)


def _first_difference(p: Pass, before: _Evaluated, after: _Evaluated) -> MeaningChanged | None:
    """The first operation with a result that no value from before equals, though one of its name was there."""
    for value in after.values:
        candidates = [v for v in before.values if v.comparable(value)]
        named = [v.tensor for v in candidates if v.name == value.name is not None]
        if named and not any(_close(v.tensor, value.tensor) for v in candidates):
            nearest = min(named, key=lambda tensor: _difference(tensor, value.tensor))
            where = "" if value.layer is None else f", layer {value.layer}"
            return _changed(p, f"%{value.name} in {describe(value.op)}{where}", nearest, value.tensor)
    return None


def _compare_steps(p: Pass, before: StepResult, after: StepResult) -> None:
    if before.logits.keys() != after.logits.keys() or before.tokens.keys() != after.tokens.keys():
        raise MeaningChanged(
            f"pass {p.name} changed which sequences get a token: {sorted(before.tokens)} before, "
            f"{sorted(after.tokens)} after"
        )
    logits = [(f"the logits of sequence {row}", one, after.logits[row]) for row, one in before.logits.items()]
    for what, one, other in logits + _cached(before.cache, after.cache):
        if not _close(one, other):
            raise _changed(p, what, one, other)
    for row, token in before.tokens.items():
        one, other = [token, *before.more.get(row, ())], [after.tokens[row], *after.more.get(row, ())]
        if one != other:
            at = next((i for i, (x, y) in enumerate(zip(one, other)) if x != y), min(len(one), len(other)))
            which = "token" if at == 0 else f"token {at + 1}"
            x, y = (tokens[at] if at < len(tokens) else "none" for tokens in (one, other))
            raise MeaningChanged(
                f"pass {p.name} changed the {which} of sequence {row}: {x} before, {y} after"
            )


def _cached(before: Cache, after: Cache) -> list[tuple[str, Tensor, Tensor]]:
    """(what, before, after) of every layer of every sequence."""
    nothing = (torch.zeros(0), torch.zeros(0))
    pairs = []
    for row in sorted(before.keys() | after.keys()):
        one, other = before.get(row, {}), after.get(row, {})
        for layer in sorted(one.keys() | other.keys()):
            for what, x, y in zip(("keys", "values"), one.get(layer, nothing), other.get(layer, nothing)):
                pairs.append((f"the cached {what} of sequence {row} in layer {layer}", x, y))
    return pairs


def _difference(before: Tensor, after: Tensor) -> float:
    """The greatest difference, relative to the greatest magnitude before, or to 1."""
    if before.shape != after.shape:
        return float("inf")
    if not before.numel():
        return 0.0
    greatest = (before.double() - after.double()).abs().max() / before.double().abs().max().clamp(min=1)
    return greatest.nan_to_num(nan=float("inf")).item()


def _close(before: Tensor, after: Tensor) -> bool:
    return _difference(before, after) <= TOLERANCE


def _changed(p: Pass, what: str, before: Tensor, after: Tensor) -> MeaningChanged:
    return MeaningChanged(
        f"pass {p.name} changed {what}: greatest relative difference {_difference(before, after):.2g}, "
        f"tolerance {TOLERANCE:g}"
    )


def _no_meaning(p: Pass, error: Exception) -> MeaningChanged:
    reason = (str(error) or repr(error)).strip().splitlines()[0]
    return MeaningChanged(f"pass {p.name} left a graph that cannot be evaluated: {reason}")
