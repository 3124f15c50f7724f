"""Sequences of one batch that begin alike compute, and read, the common beginning once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
from attrs import frozen

from sagellm.batch import Batch, Columns, Phase
from sagellm.ir.attrs import group_type, rows_type, word
from sagellm.ir.dialects import batch as b
from sagellm.ir.edit import insert_after, users
from sagellm.ir.graph import IRGraph
from sagellm.passes.cohorts import Cohorts, Gain, find_cohorts
from sagellm.passes.driver import Pass, PassContext, StepView, rewrites
from sagellm.target import AttentionShape, CostModel

SHARED, CASCADE = "shared", "cascade"
REWRITES = {
    "prefill": (
        b.Share,
        SHARED,
        "common beginnings are computed once",
        "no two prompts of this step begin alike",
    ),
    "decode": (
        b.Cascade,
        CASCADE,
        "common beginnings are read once",
        "no decode rows of this step gain by reading a common beginning together",
    ),
}
"""By phase: the operation, its word, what it does, and what is so where the fact is missing."""


@dataclass(frozen=True)
class PrefixDedup(Pass):
    """Prompts in a batch that begin alike compute the common tokens once, at any depth of branching; decode rows that
    have the same first KV blocks read these together (Hydragen, Juravsky et al. 2024).

    decide, prompts: orders the prefills by their tokens; a row whose beginning equals its neighbour's follows it. The
    follower takes over full KV blocks; keys and values of a block that is shared in part are written to both.
    decide, decodes: finds cohorts in the block tables, weighs them by the device's costs, and keeps them for as long
    as the same sequences decode.
    apply: puts `batch.share` behind the prefill group, `batch.cascade` behind the decode group, and marks the rows.
    Declines when no two prompts of the step begin with the same uncached token, and for decode rows where short or
    few common beginnings save less than another call in each layer takes. Prompts of different tenants share
    nothing, and one whose own logprobs are wanted follows nobody. Layers with a window read each row alone.
    """

    optional: ClassVar[tuple[str, ...]] = (CASCADE,)
    name: ClassVar[str] = "prefix-dedup"
    graph: ClassVar[Literal["batch"]] = "batch"

    def decide(self, batch: Batch, view: StepView) -> None:
        c, rows = batch.columns, batch.prefill
        c.leader[rows], c.shared[rows], c.common[batch.decode] = -1, 0, 0
        if len(rows) > 1 and (note := self._share_prompts(batch)):
            batch.notes[self.name] = note
        if len(batch.decode) > 1 and view.attention is not None and view.attention.layers:
            self._read_together(batch, view.costs, view.attention)

    def _share_prompts(self, batch: Batch) -> str | None:
        c, rows = batch.columns, batch.prefill
        end = c.context + c.new
        own = np.where(c.length > c.alike_up_to, c.length, 0)
        alike = {int(r): (int(c.context[r]), int(own[r]), int(c.tenant[r])) for r in rows}
        keys = {r: (who, c.tokens[r, : end[r]].astype(">i4").tobytes()) for r, who in alike.items()}
        order = sorted(keys, key=keys.__getitem__)
        for before, row in pairwise(order):
            if alike[before] != alike[row] or c.prompt_logprobs[row] >= 0 or c.pooling[row]:
                continue
            shared = common_prefix(c, before, row, int(min(end[before], end[row]))) - int(c.context[row])
            if shared <= 0:
                continue
            while c.leader[before] >= 0 and c.shared[before] >= shared:
                before = int(c.leader[before])
            c.leader[row], c.shared[row] = before, shared
        saved = int(c.shared[rows].sum())
        if not saved:
            return None
        _add_fact(batch, Phase.PREFILL, SHARED)
        followers = int((c.shared[rows] > 0).sum())
        return f"{saved} of {c.new[rows].sum()} prompt tokens are taken over by {followers} of {len(rows)} prompts"

    def _read_together(self, batch: Batch, costs: CostModel, shape: AttentionShape) -> None:
        c, rows = batch.columns, batch.decode
        same = rows.tobytes(), c.number[rows].tobytes()
        kept: Kept | None = c.kept.get(self.name)
        if kept is None or kept.same != same or kept.blocks != c.blocks[kept.rows, kept.last].tobytes():
            gain, calls = partial(cascade_gain, costs, shape), costs.seconds(calls=shape.layers)
            kept = c.kept[self.name] = _judge(c, rows, same, find_cohorts(c, rows, gain), gain, calls)
        if kept.together:
            c.cohort[rows], c.common[rows] = kept.cohorts.cohort, kept.cohorts.common
            _add_fact(batch, Phase.DECODE, CASCADE)
            earlier = batch.notes.get(self.name)
            batch.notes[self.name] = f"{earlier}; {kept.note}" if earlier else kept.note
        elif kept.note:
            batch.declines[self.name] = kept.note

    @rewrites(b.Group)
    def share(self, group: b.Group, graph: IRGraph, context: PassContext) -> None:
        kind, word_, done, missing = REWRITES[group.phase.data]
        if group.facts is None or word(word_) not in group.facts.data:
            self.declined(context, group, missing)
            return
        op = kind.create(operands=[group.result], result_types=[group_type(*group.result.type.data, word_)])
        group.result.replace_uses_with_if(op.result, lambda use: use.operation is not op)
        insert_after(group, op)
        op.result.name_hint = word_
        for user in users(op.result):
            if isinstance(user, b.Rows):
                marked = rows_type(*user.result.type.data, word_)
                rows = b.Rows.create(operands=user.operands, result_types=[marked])
                insert_after(user, rows)
                rows.result.name_hint = user.result.name_hint
                user.result.replace_all_uses_with(rows.result)
                user.detach()
                user.erase()
        self.applied(context, group, done)


def cascade_gain(costs: CostModel, shape: AttentionShape, rows: int, tokens: int) -> float:
    """Seconds of a step saved by reading `tokens` once for `rows` rows, less what joining two results moves."""
    joined = 12 * shape.layers * shape.heads * shape.head_dim * rows
    alone, together = (shape.seconds(costs, rows, tokens, reads) for reads in (rows, 1))
    return alone - together - costs.seconds(moved=joined, calls=0)


@frozen
class Kept:
    """What was found about decode rows, for as long as these decode and the last blocks they share are the same."""

    same: tuple[bytes, bytes]
    cohorts: Cohorts
    together: bool
    """Whether it pays."""
    note: str
    rows: np.ndarray
    last: np.ndarray
    blocks: bytes
    """Entries `last` of the block tables of `rows`."""


def _judge(
    c: Columns, rows: np.ndarray, same: tuple[bytes, bytes], found: Cohorts, gain: Gain, calls: float
) -> Kept:
    """Cohorts pay where they save more than the further `calls` take."""
    members = np.flatnonzero(found.common)
    last = found.common[members] // c.block_size - 1
    predicted = (found.gain or gain(2, found.longest)) - calls
    saved = f"(predicted: {predicted * 1e6:+.1f} us)"
    if not found.longest:
        note = ""
    elif predicted > 0:
        most, count = int(found.common.max()), len(np.unique(found.cohort[members]))
        who = f"{len(members)} of {len(rows)} decode rows"
        note = f"{who} read up to {most} tokens together, in {count} cohorts {saved}"
    else:
        note = f"decode rows have up to {found.longest} tokens of blocks in common: too few to gain {saved}"
    together = bool(len(members)) and predicted > 0
    blocks = c.blocks[rows[members], last].tobytes()
    return Kept(same, found, together, note, rows[members], last, blocks)


def _add_fact(batch: Batch, phase: Phase, fact: str) -> None:
    facts = batch.facts.get(phase, ())
    if fact not in facts:
        batch.facts[phase] = (*facts, fact)


def common_prefix(columns: Columns, one: int, other: int, limit: int) -> int:
    """How many of the first `limit` tokens of two rows are equal."""
    differ = np.flatnonzero(columns.tokens[one, :limit] != columns.tokens[other, :limit])
    return int(differ[0]) if len(differ) else limit
