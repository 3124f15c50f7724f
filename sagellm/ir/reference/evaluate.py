"""Evaluates the weights program, the model graph and the batch graph by the operations' meanings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from xdsl.ir import Block, SSAValue

from sagellm.batch import Batch
from sagellm.errors import UserError, unknown
from sagellm.ir.dialects import nn
from sagellm.ir.edit import only_block, operations
from sagellm.ir.graph import IRGraph
from sagellm.ir.reference import batch as batch_meanings
from sagellm.ir.reference import comm as comm_meanings
from sagellm.ir.reference import kv as kv_meanings
from sagellm.ir.reference import nn as nn_meanings
from sagellm.ir.reference import spec as spec_meanings
from sagellm.ir.reference import weights as weights_meanings
from sagellm.ir.reference.values import (
    Cache,
    Exchange,
    LoadScope,
    LogicalRows,
    ModelScope,
    Observe,
    StepResult,
    StepScope,
    Weights,
    alone,
)

MEANINGS: dict[str, Callable] = {
    op.name: meaning
    for part in (nn_meanings, comm_meanings, weights_meanings, batch_meanings, kv_meanings, spec_meanings)
    for op, meaning in part.MEANINGS.items()
}
"""Name of an operation -> `(scope, op, *operands)` to its result: nothing, one value, or a tuple."""


def evaluate_weights(
    graph: IRGraph, read: Callable[[str], Tensor], *, exact: bool = False, rank: int = 0, ranks: int = 1
) -> Weights:
    """The runtime weights of each function, per layer. `read` gives a tensor of the checkpoint by name.

    exact: bfloat16 and float16 are evaluated as float32, so that no rounding hides or fakes a difference.
    """
    result: Weights = {}
    for name, load in graph.loads.items():
        first, count = load.first.value.data, load.count.value.data
        result[name] = []
        for layer in range(first, first + count):
            scope = LoadScope(read, layer, layer == first + count - 1, exact, rank, ranks)
            _run(only_block(load), scope, ())
            result[name].append(scope.stored)
    return result


def evaluate_model(
    graph: IRGraph,
    weights: Weights,
    rows: LogicalRows,
    cache: Cache,
    *,
    function: str = "model",
    exact: bool = False,
    observe: Observe | None = None,
    exchange: Exchange = alone,
) -> Tensor:
    """Logits float32 [R, V] of a function of the model graph. Keys and values are appended to `cache`.

    A graph for several ranks is evaluated on each, with its weights and cache: see `ranks.py`.
    """
    return _caller(graph, weights, cache, exact, observe, exchange)(function, None, (rows,))[0]


def evaluate_function(
    graph: IRGraph, function: str, arguments: Sequence[Any], weights: Weights, *, exchange: Exchange = alone
) -> tuple:
    """What a function of the model graph that touches no cache returns."""
    return _caller(graph, weights, {}, False, None, exchange)(function, None, arguments)


def evaluate_step(
    step: IRGraph,
    model: IRGraph,
    weights: Weights,
    batch: Batch,
    cache: Cache,
    *,
    exact: bool = False,
    observe: Observe | None = None,
) -> StepResult:
    """What a batch graph does. `model` holds `@model` and `@sample`; `cache` holds every row's context and stays.

    Lengths and decisions are read from the graph's tables where these have values, tokens and sampling columns
    from the batch.
    """
    if step.step is None:
        raise UserError("the graph has no batch.step; accepted: a module with one")
    after = {row: dict(layers) for row, layers in cache.items()}
    call = _caller(model, weights, after, exact, observe)
    scope = StepScope(
        batch,
        after,
        forward=lambda name, rows: call(name, None, (rows,))[0],
        sample=lambda name, logits, how: call(name, None, (logits, how))[0],
    )
    _run(only_block(step.step), scope, (), observe)
    return StepResult(scope.logits, scope.tokens, after, scope.more)


def _caller(
    graph: IRGraph,
    weights: Weights,
    cache: Cache,
    exact: bool,
    observe: Observe | None,
    exchange: Exchange = alone,
) -> Callable[[str, int | None, Sequence[Any]], tuple]:
    """`call(function, layer, arguments)`: run a function of the graph with the weights of a layer."""
    functions, loads = graph.functions, graph.loads

    def call(name: str, layer: int | None, arguments: Sequence[Any]) -> tuple:
        if name not in functions:
            raise unknown("function", name, functions)
        own: dict[str, Tensor] = {}
        if name in weights:
            first = loads[name].first.value.data if name in loads else 0
            own = weights[name][0 if layer is None else layer - first]
        scope = ModelScope(own, layer, cache, call, exact, exchange)
        return _run(only_block(functions[name]), scope, arguments, observe)

    return call


def _run(block: Block, scope: Any, arguments: Sequence[Any], observe: Observe | None = None) -> tuple:
    """Evaluate a block; gives what its `nn.return` returns, or nothing."""
    values: dict[SSAValue, Any] = dict(zip(block.args, arguments, strict=True))
    for op in operations(block):
        operands = [values[operand] for operand in op.operands]
        if isinstance(op, nn.Return):
            return tuple(operands)
        if op.name not in MEANINGS:
            raise UserError(f"{op.name} has no meaning; accepted: {', '.join(MEANINGS)}")
        result = MEANINGS[op.name](scope, op, *operands)
        results = result if isinstance(result, tuple) else (result,)
        values.update(zip(op.results, results))
        if observe is not None:
            observe(op, getattr(scope, "layer", None), results)
    return ()
