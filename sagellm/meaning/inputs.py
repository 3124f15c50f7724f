"""Inputs for checks: random checkpoint tensors, a few rows, and the KV cache that a batch starts with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from sagellm.batch import Batch
from sagellm.errors import UserError
from sagellm.ir.attrs import integer, last_dim
from sagellm.ir.dialects import nn, weights
from sagellm.ir.edit import only_block, operations
from sagellm.ir.graph import IRGraph
from sagellm.ir.reference import Cache, Forwarded, LogicalRows, Weights, evaluate_model
from sagellm.ir.reference.weights import source_name

Read = Callable[[str], Tensor]
"""A tensor of the checkpoint by name."""

SPANS = ((5, 6, 6), (0, 7, 7), (3, 8, 12))
"""First and end position, and known length, of `small_rows`: a decode, a prompt, the middle of a prompt."""


def random_tensors(graph: IRGraph) -> Read:
    """The checkpoint tensors that the weights program reads: random, a function of their name and shape alone.

    Matrices are normal with deviation 1/sqrt(columns), vectors standard normal; float32.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for load in graph.loads.values():
        first, end = load.first.value.data, load.first.value.data + load.count.value.data
        for op in operations(only_block(load)):
            if isinstance(op, weights.Tensor):
                for layer in range(first, end):
                    shapes[source_name(op, layer, last=layer == end - 1)] = op.source_shape
    made: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in shapes:
            raise UserError(f"the weights program did not read the tensor {name} before")
        if name not in made:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
            values = torch.randn(shapes[name], generator=torch.Generator().manual_seed(seed))
            made[name] = values / shapes[name][-1] ** 0.5 if len(shapes[name]) > 1 else values
        return made[name]

    return read


def small_rows(graph: IRGraph, seed: int = 0) -> LogicalRows:
    """A decode, a whole prompt and a chunk in the middle of one, of random tokens of the model's vocabulary."""
    longest = positions(graph)
    tokens = np.random.default_rng(seed).integers(vocab_size(graph), size=(len(SPANS), 16))
    sequences = []
    for row, (start, end, length) in enumerate(SPANS):
        start, end, length = min(start, longest - 1), min(end, longest), min(length, longest)
        outputs = (end - 1,) if end == length else ()
        known = tuple(tokens[row, start:end].tolist())
        sequences.append(Forwarded(row, range(start, end), known, length, outputs))
    return LogicalRows(tuple(sequences))


def cache_before(graph: IRGraph, weights: Weights, rows: LogicalRows) -> Cache:
    """A float32 cache of the positions before those that the rows forward, as if token 0 stood there."""
    starts = [(s.row, s.positions.start, s.length) for s in rows.sequences]
    return _filled(
        graph, weights, [Forwarded(row, range(n), (0,) * n, length, ()) for row, n, length in starts if n]
    )


def context_cache(graph: IRGraph, weights: Weights, batch: Batch) -> Cache:
    """The float32 cache that the sequences of a batch have before the step, as the model computes it."""
    c, sequences = batch.columns, []
    for row in np.concatenate([batch.decode, batch.prefill]).tolist():
        if context := int(c.context[row]):
            known = tuple(c.tokens[row, :context].tolist())
            sequences.append(Forwarded(row, range(context), known, int(c.length[row]), ()))
    return _filled(graph, weights, sequences)


def _filled(graph: IRGraph, weights: Weights, sequences: Iterable[Forwarded]) -> Cache:
    cache: Cache = {}
    evaluate_model(graph, weights, LogicalRows(tuple(sequences)), cache, exact=True)
    return cache


def shortened(graph: IRGraph) -> IRGraph:
    """A copy with at most two layers in every segment: the layers of one are equal."""
    graph = graph.clone()
    for op in (*graph, *graph.walk()):
        if isinstance(op, (weights.Load, nn.Repeat)):
            op.properties["count"] = integer(min(2, op.count.value.data))
    return graph


def vocab_size(graph: IRGraph) -> int:
    if "model" not in graph.functions:
        raise UserError("the graph has no function @model; accepted: a model graph")
    return last_dim(graph.functions["model"].function_type.outputs.data[0])


def positions(graph: IRGraph) -> int:
    """How many positions the model's rope table has; 16 if there is none."""
    tables = [op for op in graph.walk() if isinstance(op, weights.RopeTable)]
    return min((op.result.type.get_shape()[0] for op in tables), default=16)
