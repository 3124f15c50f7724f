"""The op-per-request lowering and the request-by-request row columns: the reference for the grouped ones.

Slow and obvious: a loop over requests and tokens in plain Python. Nothing of the engine runs on it.
"""

from __future__ import annotations

import numpy as np

from sagellm.batch import Batch, Phase, Stage
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
    words,
)
from sagellm.ir.build import Body
from sagellm.ir.dialects import batch as b
from sagellm.ir.dialects import kv
from sagellm.ir.graph import IRGraph
from sagellm.ir.lower import bucket, stage_words, step_graph
from sagellm.rows import Rows


def lower_requests(batch: Batch, vocab_size: int) -> IRGraph:
    """The step's graph with a `batch.group` for every single request."""
    body, groups, phases = Body({}), [], []
    for phase in Phase:
        columns, name = batch.table(phase), phase.name.lower()
        phases += [name] if len(columns["row"]) else []
        for index in range(len(columns["row"])):
            one = {key: column[index : index + 1] for key, column in columns.items()}
            facts = batch.facts.get(phase)
            groups.append(
                body(
                    b.Group,
                    [],
                    group_type(name),
                    phase=name,
                    bucket=integer(bucket(int(one["new"][0]))),
                    facts=words(facts) if facts else None,
                    table=TableAttr(Table(1, one)),
                )
            )
    stages = Stage(0)
    for row in batch.output_rows():
        stages |= Stage(int(batch.columns.stages[row]))
    room = body(kv.Allocate, groups, BLOCKS)
    rows = body(b.Rows, [*groups, room], rows_type(*phases))
    how = body(b.Sampling, groups, sampling_type(*stage_words(stages)))
    logits = body(b.Forward, [rows], tensor("float32", None, vocab_size), model=symbol("model"))
    tokens = body(b.Sample, [logits, how], tensor("int64", None), sampler=symbol("sample"))
    body(b.Commit, [tokens, *groups])
    return step_graph(body.block)


def request_rows(batch: Batch, *, shared: bool = False, cascade: bool = False) -> Rows:
    """The columns of `sagellm.rows.build_rows`, token by token. The rows' blocks are given out already."""
    c, size = batch.columns, batch.columns.block_size
    forwarded: list[tuple[int, int]] = []
    """(row, position) of each token on the flattened axis"""
    extra: list[tuple[int, int]] = []
    """(row, position) that a row needs in a block of its own, though its leader computes it"""
    working = []
    """(row, first token, tokens) of the prefills with something left to forward"""
    for row in batch.decode:
        forwarded.append((row, c.context[row]))
    for row in batch.prefill:
        start = c.context[row] + (c.shared[row] if shared else 0)
        end = c.context[row] + c.new[row]
        if start < end:
            working.append((row, len(forwarded), end - start))
        forwarded += [(row, position) for position in range(start, end)]
        for position in range(c.context[row], start):
            if c.blocks[row, position // size] != c.blocks[c.leader[row], position // size]:
                extra.append((row, position))
    place = {at: token for token, at in enumerate(forwarded)}

    def token_of(row: int, position: int) -> int:
        while (row, position) not in place:
            row = c.leader[row]
        return place[row, position]

    def slot(row: int, position: int) -> int:
        return c.blocks[row, position // size] * size + position % size

    def block_table(rows: list[int], lengths: list[int]) -> np.ndarray:
        width = max((-(-length // size) for length in lengths), default=0)
        return np.array([c.blocks[row, :width] for row in rows], np.int64).reshape(len(rows), width)

    cohorts: dict[int, list[int]] = {}
    for index, row in enumerate(batch.decode):
        if cascade and c.common[row]:
            cohorts.setdefault(c.cohort[row], []).append(index)
    members = [cohorts[number] for number in sorted(cohorts)]
    decode_lengths = [c.context[row] + 1 for row in batch.decode]
    prefills = [row for row, _, _ in working]
    prefill_lengths = [c.context[row] + c.new[row] for row in prefills]
    copies = [token_of(row, position) for row, position in extra]
    told = [
        (row, position)
        for row, position in forwarded
        if c.prompt_logprobs[row] >= 0 and c.computed[row] <= position < c.prompt[row] - 1
    ]
    return Rows(
        tokens=np.array([c.tokens[at] for at in forwarded]),
        positions=np.array([position for _, position in forwarded]),
        lengths=np.array([c.length[row] for row, _ in forwarded]),
        slots=np.array([slot(*at) for at in forwarded + extra]),
        kv_source=np.array([*range(len(forwarded)), *copies]) if extra else None,
        outputs=np.array(
            [token_of(row, c.length[row] - 1) for row in batch.output_rows()]
            + [token_of(*at) for at in told],
            np.int64,
        ),
        prompt_rows=np.array([row for row, _ in told], np.int64),
        prompt_positions=np.array([position for _, position in told], np.int64),
        decode_blocks=block_table(list(batch.decode), decode_lengths),
        decode_lengths=np.array(decode_lengths),
        cohort_rows=np.array([index for cohort in members for index in cohort], np.int64),
        cohort_offsets=np.cumsum([0, *map(len, members)]),
        cohort_common=np.array([c.common[batch.decode[cohort[0]]] for cohort in members], np.int64),
        prefill_blocks=block_table(prefills, prefill_lengths),
        prefill_lengths=np.array(prefill_lengths),
        prefill_offsets=np.array([first for _, first, _ in working] + [len(forwarded)]),
    )
