"""Sequences that repeat what was said before get several tokens in one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sagellm.batch import Batch, Phase, Stage
from sagellm.ir.attrs import group_type, rows_type, word
from sagellm.ir.dialects import batch as b
from sagellm.ir.dialects import spec
from sagellm.ir.edit import insert_after, insert_before, users
from sagellm.ir.graph import IRGraph
from sagellm.passes.driver import Pass, PassContext, StepView, rewrites
from sagellm.passes.prefix_dedup import PrefixDedup
from sagellm.target import StepCost

DRAFTED = "drafted"
TREE = "tree"
MOST_NODES = 256
"""Guesses of all sequences in one step."""


@dataclass(frozen=True)
class SpeculativeBranching(Pass):
    """Tokens are guessed and verified in one forward, as many as are expected to pay.

    decide: guesses are what followed the same last tokens before, in this text or in another of the same tenant, and
    a second continuation where there is one. How likely each will hold is measured, by the length of the repetition
    and by sequence; the likeliest are taken, as many as give most tokens per second by the cost model.
    apply: puts `spec.branch` behind the decodes, `spec.verify` and `spec.commit` before the commit.
    A token is chosen as it would be without guesses: outputs stay the same, sampled ones too.
    Sequences with a grammar get no guesses, as what is allowed behind these is not known.
    Declines in a step with prompts, where nothing is known to follow, where so many sequences decode that guesses
    cannot pay, and where those that were verified did not hold often enough; these are tried again one step in `probe`.
    Many sequences that repeat nothing are not looked at in every step.
    """

    gain: float = 1.05
    """How many times more tokens per second are wanted at least."""
    probe: int = 64

    name: ClassVar[str] = "speculative-branching"
    graph: ClassVar[Literal["batch"]] = "batch"

    def decide(self, batch: Batch, view: StepView) -> None:
        c, rows, drafts, cost = batch.columns, batch.decode, view.drafts, view.step
        c.drafted[rows] = 0
        if drafts is None or cost is None or len(batch.prefill) or not len(rows):
            return
        room = min(MOST_NODES, *batch.spare)
        if room <= 0 or self._best(np.ones(room), len(rows), cost) == 0:
            return
        drafts.waited += 1
        if drafts.rest > 0:
            drafts.rest -= 1
            return
        drafts.pause = drafts.rest = min(2 * drafts.pause + 1, len(rows) // 2)
        found = drafts.follow(rows)
        known = np.flatnonzero((found >= 0).any(1) & (c.stages[rows] & Stage.GRAMMAR == 0))
        guesses = drafts.guess(rows[known], found[known]) if len(known) else None
        if guesses is None:
            return
        order = np.argsort(-guesses.chances, axis=None, kind="stable")[:room]
        chances = guesses.chances.ravel()[order]
        order, chances = order[chances > 0], chances[chances > 0]
        count = self._best(chances, len(rows), cost)
        if count > 0:
            drafts.pause = drafts.rest = 0
        elif len(order) and drafts.waited >= self.probe:
            count, drafts.waited = min(2, len(order)), 0
        else:
            return
        chosen = np.zeros(guesses.chances.size, bool)
        chosen[order[:count]] = True
        drafts.write(rows[known], guesses, chosen.reshape(guesses.chances.shape))
        some = c.drafted[rows] > 0
        batch.decode = np.concatenate([rows[~some], rows[some]])
        batch.facts[Phase.DECODE] = (DRAFTED,)
        if batch.notes.pop(PrefixDedup.name, None):
            batch.declines[PrefixDedup.name] = "guesses are verified in this step, and their rows read alone"
        batch.notes[self.name] = (
            f"{count} tokens are guessed for {some.sum()} of {len(rows)} sequences, "
            f"{chances[:count].sum():.1f} are expected to hold"
        )

    def _best(self, chances: np.ndarray, rows: int, cost: StepCost) -> int:
        """How many guesses, the likeliest first, give most tokens per second; 0 where none gives enough."""
        if not len(chances):
            return 0
        guesses = np.arange(1, len(chances) + 1)
        rate = (rows + np.cumsum(chances)) / (cost.seconds(rows + guesses) + cost.verify)
        best = int(rate.argmax())
        return best + 1 if rate[best] >= self.gain * rows / cost.seconds(rows) else 0

    @rewrites(b.Group)
    def branch(self, group: b.Group, graph: IRGraph, context: PassContext) -> None:
        if group.phase.data != Phase.DECODE.name.lower():
            return
        if group.facts is None or word(DRAFTED) not in group.facts.data:
            self.declined(context, group, "no guess is expected to pay in this step")
            return
        tree = spec.Branch.create(
            operands=[group.result], result_types=[group_type(*group.result.type.data, TREE)]
        )
        group.result.replace_uses_with_if(tree.result, lambda use: use.operation is not tree)
        insert_after(group, tree)
        tree.result.name_hint = "tree"
        for user in users(tree.result):
            if isinstance(user, b.Rows):
                _mark(user)
            if isinstance(user, b.Commit):
                verify = spec.Verify.create(
                    operands=[user.tokens, tree.result], result_types=[user.tokens.type]
                )
                verify.result.name_hint = "path"
                move = spec.Commit.create(operands=[verify.result, tree.result])
                insert_before(user, verify, move)
                user.operands[0] = verify.result
        self.applied(context, group, "guessed tokens are verified in one forward")


def _mark(rows: b.Rows) -> None:
    marked = b.Rows.create(operands=rows.operands, result_types=[rows_type(*rows.result.type.data, TREE)])
    insert_after(rows, marked)
    marked.result.name_hint = rows.result.name_hint
    rows.result.replace_all_uses_with(marked.result)
    rows.detach()
    rows.erase()
