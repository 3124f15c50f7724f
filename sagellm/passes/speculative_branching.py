"""Sequences that repeat what was said before get several tokens in one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sagellm.batch import Batch, Columns, Phase, Stage
from sagellm.drafts import DEPTH, NOTHING, Drafts, Guesses
from sagellm.ir.attrs import group_type, rows_type, word
from sagellm.ir.dialects import batch as b
from sagellm.ir.dialects import spec
from sagellm.ir.edit import insert_after, insert_before, users
from sagellm.ir.graph import IRGraph
from sagellm.passes.driver import Pass, PassContext, StepView, rewrites
from sagellm.passes.prefix_dedup import CASCADE, PrefixDedup
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
    A draft model, where there is one, guesses for the sequences that it is likelier to be right about, if that pays for
    its own steps.
    apply: puts `spec.branch` behind the decodes, `spec.verify` and `spec.commit` before the commit.
    A token is chosen as it would be without guesses: outputs stay the same, sampled ones too.
    Sequences with a grammar get no guesses, as what is allowed behind these is not known.
    Declines in a step with prompts, where nothing is known to follow, where so many sequences decode that guesses
    cannot pay, and where those that were verified did not hold often enough; these are tried again one step in `probe`.
    What it expects is measured too: a step without guesses among those with some, seconds by the token.
    Many sequences that repeat nothing are not looked at in every step.
    """

    gain: float = 1.05
    """How many times more tokens per second are wanted at least."""
    probe: int = 64
    """What does not seem to pay is tried again one step in so many; half as often where a draft model is tried too."""

    optional: ClassVar[tuple[str, ...]] = (DRAFTED,)
    uneven: ClassVar[bool] = True
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
        firsts = np.zeros(len(rows))
        known, guesses = self._look(c, rows, drafts)
        chosen = None
        if guesses is not None:
            firsts[known] = guesses.chances[:, 0, 0]
            patience = self.probe if view.draft_model is None else 2 * self.probe
            chosen = self._choose(guesses, len(rows), room, drafts, cost, patience)
        held, taken = np.zeros(len(rows)), np.zeros(len(rows), int)
        if guesses is not None and chosen is not None:
            held[known] = np.where(chosen, guesses.chances, 0).sum((1, 2))
            taken[known] = chosen.sum((1, 2))
        asked = self._ask(batch, view, room, firsts, held, taken)
        if len(asked):
            held[asked] = 0
        if guesses is not None and chosen is not None:
            if len(asked):
                chosen[np.isin(known, asked)] = False
            drafts.write(rows[known], guesses, chosen)
        some = c.drafted[rows] > 0
        if not some.any():
            return
        if drafts.waited == 0:
            batch.probes.add(self.name)
        batch.decode = np.concatenate([rows[~some], rows[some]])
        batch.facts[Phase.DECODE] = (DRAFTED,)
        if batch.notes.pop(PrefixDedup.name, None):
            batch.declines[PrefixDedup.name] = "guesses are verified in this step, and their rows read alone"
        by = f", those of {len(asked)} by the draft model" if len(asked) else ""
        batch.notes[self.name] = (
            f"{c.drafted[rows].sum()} tokens are guessed for {some.sum()} of {len(rows)} sequences{by}; "
            f"{held.sum():.1f} of those from text are expected to hold"
        )

    def leave_out(self, batch: Batch, fact: str) -> None:
        """Each sequence gets its one token, and beginnings are read together again where that was decided."""
        c, rows = batch.columns, batch.decode
        c.drafted[rows] = 0
        batch.facts[Phase.DECODE] = (CASCADE,) if c.common[rows].any() else ()

    def _look(self, c: Columns, rows: np.ndarray, drafts: Drafts) -> tuple[np.ndarray, Guesses | None]:
        """Which of the rows text is known for, and what it says; many rows are not looked at in every step."""
        nothing = np.zeros(0, np.int64), None
        if drafts.rest > 0:
            drafts.rest -= 1
            return nothing
        drafts.pause = drafts.rest = min(2 * drafts.pause + 1, len(rows) // 2)
        found = drafts.follow(rows)
        known = np.flatnonzero((found >= 0).any(1) & (c.stages[rows] & Stage.GRAMMAR == 0))
        guesses = drafts.guess(rows[known], found[known]) if len(known) else None
        return nothing if guesses is None else (known, guesses)

    def _choose(
        self, guesses: Guesses, rows: int, room: int, drafts: Drafts, cost: StepCost, patience: int
    ) -> np.ndarray | None:
        """Which guesses from text are worth it, bool as their chances; None where none is."""
        order = np.argsort(-guesses.chances, axis=None, kind="stable")[:room]
        chances = guesses.chances.ravel()[order]
        order, chances = order[chances > 0], chances[chances > 0]
        count = self._best(chances, rows, cost)
        if count > 0:
            drafts.pause = drafts.rest = 0
        elif len(order) and drafts.waited >= patience:
            count, drafts.waited = min(2, len(order)), 0
        else:
            return None
        chosen = np.zeros(guesses.chances.size, bool)
        chosen[order[:count]] = True
        return chosen.reshape(guesses.chances.shape)

    def _ask(
        self, batch: Batch, view: StepView, room: int, firsts: np.ndarray, held: np.ndarray, taken: np.ndarray
    ) -> np.ndarray:
        """Have the draft model guess for rows that it is likelier to be right about than text is: for as many and as
        deep as give most tokens per second, its own steps included. Writes the guesses; returns whose they are.

        By row: `firsts`, how likely the first guess from text holds; `taken`, its guesses; `held`, how many will hold.
        """
        c, rows = batch.columns, batch.decode
        drafts, model, cost = view.drafts, view.draft_model, view.step
        nobody = np.zeros(0, np.int64)
        if model is None or drafts is None or cost is None:
            return nobody
        drafts.model_waited += 1
        if drafts.model_rest > 0:
            drafts.model_rest -= 1
            return nobody
        likely = drafts.of_model(rows)
        left = np.minimum(np.minimum(c.limit[rows], c.max_length), model.longest) - c.length[rows] - 1
        free = c.stages[rows] & Stage.GRAMMAR == 0
        able = np.flatnonzero((likely > firsts) & (left > 0) & free)
        able = able[np.argsort(-likely[able], kind="stable")][:room]
        if not len(able):
            return nobody
        depth, many = np.arange(1, DEPTH + 1), np.arange(1, len(able) + 1)[:, None]
        there = depth <= left[able, None]
        others, sure = (some.sum() - np.cumsum(some[able])[:, None] for some in (taken, held))
        nodes = others + there.cumsum(1).cumsum(0)
        gain = sure + (there * likely[able, None] ** depth).cumsum(1).cumsum(0)
        late = np.cumsum(model.behind(rows[able]) / left[able])[
            :, None
        ]  # is made up for by all that is still to come
        took = cost.seconds(len(rows) + nodes) + cost.verify
        took = took + depth * model.cost.seconds(many) + late * model.cost.token
        rate = np.where(nodes <= room, (len(rows) + gain) / took, 0)
        most, deep = np.unravel_index(rate.argmax(), rate.shape)
        wanted = self.gain * len(rows) / cost.seconds(len(rows))
        if taken.any():
            wanted = max(
                wanted, (len(rows) + held.sum()) / (cost.seconds(len(rows) + taken.sum()) + cost.verify)
            )
        if rate[most, deep] < wanted:
            if not taken.any():
                drafts.model_pause = drafts.model_rest = min(2 * drafts.model_pause + 1, len(rows) // 2)
            if drafts.model_waited < 2 * self.probe:
                return nobody
            most, deep = 0, 0
            batch.probes.add(self.name)
        else:
            drafts.model_pause = drafts.model_rest = 0
        drafts.model_waited = 0
        asked = able[: most + 1]
        tokens = model.guess(rows[asked], int(deep) + 1)
        tokens[np.arange(deep + 1) >= left[asked, None]] = NOTHING
        asked, tokens = asked[tokens[:, 0] >= 0], tokens[tokens[:, 0] >= 0]
        drafts.write_model(rows[asked], tokens)
        return asked

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
