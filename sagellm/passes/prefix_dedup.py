"""Prompts of one batch that begin alike compute the common beginning once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np

from sagellm.batch import Batch, Columns, Phase
from sagellm.ir.attrs import group_type, rows_type, word
from sagellm.ir.dialects import batch as b
from sagellm.ir.edit import insert_after, users
from sagellm.ir.graph import IRGraph
from sagellm.passes.driver import Pass, PassContext, StepView, rewrites

SHARED = "shared"


@dataclass(frozen=True)
class PrefixDedup(Pass):
    """Prompts in a batch that begin alike compute the common tokens once, at any depth of branching.

    decide: orders the prefills by their tokens; a row whose beginning equals its neighbour's follows it. The
    follower takes over full KV blocks; keys and values of a block that is shared in part are written to both.
    apply: puts `batch.share` behind the prefill group and marks the rows as shared.
    Declines when no two prompts of the step begin with the same uncached token. Prompts of different tenants share
    nothing, and one whose own logprobs are wanted follows nobody.
    """

    name: ClassVar[str] = "prefix-dedup"
    graph: ClassVar[Literal["batch"]] = "batch"

    def decide(self, batch: Batch, view: StepView) -> None:
        c, rows = batch.columns, batch.prefill
        c.leader[rows], c.shared[rows] = -1, 0
        if len(rows) < 2:
            return
        end = c.context + c.new
        own = np.where(c.length > c.alike_up_to, c.length, 0)
        alike = {int(r): (int(c.context[r]), int(own[r]), int(c.tenant[r])) for r in rows}
        keys = {r: (who, c.tokens[r, : end[r]].astype(">i4").tobytes()) for r, who in alike.items()}
        order = sorted(keys, key=keys.__getitem__)
        for before, row in pairwise(order):
            if alike[before] != alike[row] or c.prompt_logprobs[row] >= 0:
                continue
            shared = common_prefix(c, before, row, int(min(end[before], end[row]))) - int(c.context[row])
            if shared <= 0:
                continue
            while c.leader[before] >= 0 and c.shared[before] >= shared:
                before = int(c.leader[before])
            c.leader[row], c.shared[row] = before, shared
        if saved := int(c.shared[rows].sum()):
            followers = int((c.shared[rows] > 0).sum())
            batch.notes[self.name] = (
                f"{saved} of {c.new[rows].sum()} prompt tokens are taken over by {followers} of {len(rows)} prompts"
            )
            batch.facts[Phase.PREFILL] = tuple(dict.fromkeys((*batch.facts.get(Phase.PREFILL, ()), SHARED)))

    @rewrites(b.Group)
    def share(self, group: b.Group, graph: IRGraph, context: PassContext) -> None:
        if group.phase.data != Phase.PREFILL.name.lower():
            return
        if group.facts is None or word(SHARED) not in group.facts.data:
            self.declined(context, group, "no two prompts of this step begin alike")
            return
        share = b.Share.create(
            operands=[group.result], result_types=[group_type(*group.result.type.data, SHARED)]
        )
        group.result.replace_uses_with_if(share.result, lambda use: use.operation is not share)
        insert_after(group, share)
        share.result.name_hint = "shared"
        for user in users(share.result):
            if isinstance(user, b.Rows):
                marked = rows_type(*user.result.type.data, SHARED)
                rows = b.Rows.create(operands=user.operands, result_types=[marked])
                insert_after(user, rows)
                rows.result.name_hint = user.result.name_hint
                user.result.replace_all_uses_with(rows.result)
                user.detach()
                user.erase()
        self.applied(context, group, "common beginnings are computed once")


def common_prefix(columns: Columns, one: int, other: int, limit: int) -> int:
    """How many of the first `limit` tokens of two rows are equal."""
    differ = np.flatnonzero(columns.tokens[one, :limit] != columns.tokens[other, :limit])
    return int(differ[0]) if len(differ) else limit
