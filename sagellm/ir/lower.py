"""A batch becomes a graph: one group per phase, whatever the number of requests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Region

from sagellm.batch import AHEAD, Batch, Phase, Stage
from sagellm.ir.attrs import (
    BLOCKS,
    Table,
    TableAttr,
    group_type,
    integer,
    rows_type,
    sampling_type,
    symbol,
    tensor,
    word,
    words,
)
from sagellm.ir.dialects import batch as b
from sagellm.ir.dialects import kv
from sagellm.ir.graph import IRGraph

STAGES = (Stage.GRAMMAR, Stage.BIAS, Stage.PENALTIES, Stage.DRAW, Stage.TOP_K, Stage.TOP_P, Stage.MIN_P)
"""In the order in which they act."""


def bucket(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length() if count else 0


def stage_words(stages: int) -> tuple[str, ...]:
    return tuple(str(stage.name).lower() for stage in STAGES if stages & stage)


def lower(batch: Batch, vocab_size: int) -> Block:
    """The step's block. Structure only: every count and id stays in the groups' tables."""
    block = Block()
    groups = []
    if len(batch.decode):
        groups.append(_group(block, batch, Phase.DECODE, len(batch.decode)))
    if len(batch.prefill):
        groups.append(_group(block, batch, Phase.PREFILL, int(batch.columns.new[batch.prefill].sum())))
    for kind, columns, properties in _moves(batch):
        rows = len(next(iter(columns.values())))
        block.add_op(kind.create(properties={"table": TableAttr(Table(rows, columns)), **properties}))
    room = _add(block, kv.Allocate, groups, BLOCKS)
    phases = tuple(group.type.data[0] for group in groups)
    rows = _add(block, b.Rows, [*groups, room], rows_type(*phases))
    if batch.pooling:
        model = {"model": symbol(f"embed_{batch.pooling}")}
        vectors = _add(block, b.Forward, [rows], tensor("float32", None, None), model)
        vectors.name_hint = "vectors"
        block.add_op(b.Report.create(operands=[vectors, *groups]))
        return block
    stages = stage_words(int(np.bitwise_or.reduce(batch.columns.stages[batch.output_rows()])))
    how = _add(block, b.Sampling, groups, sampling_type(*stages))
    logits = tensor("float32", None, vocab_size)
    hidden = _add(block, b.Forward, [rows], logits, {"model": symbol("model")})
    tokens = _add(block, b.Sample, [hidden, how], tensor("int64", None), {"sampler": symbol("sample")})
    block.add_op(b.Commit.create(operands=[tokens, *groups]))
    return block


def _moves(batch: Batch) -> Iterator[tuple[type, dict[str, np.ndarray], dict]]:
    moves = batch.moves
    if moves.evict:
        yield kv.Evict, {"block": np.array(moves.evict)}, {}
    for kind, names, pairs, properties in (
        (kv.Offload, ("block", "slot"), moves.offload, {}),
        (kv.Fetch, ("slot", "block"), moves.fetch, {}),
        (kv.Copy, ("block", "copy"), moves.copy, {}),
        (kv.Offload, ("block", "slot"), moves.ahead, {"when": word(AHEAD)}),
        (kv.Fetch, ("slot", "block"), moves.fetch_ahead, {"when": word(AHEAD)}),
    ):
        if pairs:
            yield kind, dict(zip(names, np.array(pairs).T)), properties


def _group(block: Block, batch: Batch, phase: Phase, tokens: int):
    name = phase.name.lower()
    properties = {
        "phase": word(name),
        "bucket": integer(bucket(tokens)),
        "table": TableAttr(Table(len(batch.rows(phase)), partial(batch.table, phase))),
    }
    if facts := batch.facts.get(phase):
        properties["facts"] = words(facts)
    return _add(block, b.Group, [], group_type(name), properties)


def _add(block: Block, kind, operands: list, result_type, properties: dict | None = None):
    op = kind.create(operands=operands, result_types=[result_type], properties=properties or {})
    block.add_op(op)
    return op.results[0]


def step_graph(block: Block) -> IRGraph:
    """The block as a module of its own, `@step`, for passes, dumps and checks."""
    step = b.Step.create(properties={"sym_name": word("step")}, regions=[Region(block)])
    return IRGraph(ModuleOp([step]))
