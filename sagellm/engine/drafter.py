"""A draft model at work: a second, smaller model says ahead what the engine's model may say.

It runs through the same compiler and executor, over columns and a KV cache of its own. Its row of a sequence is the
engine's row; what was said since, and what was guessed and did not hold, is seen by comparing tokens, so it needs no
word of a rejection, or of a sequence that is put back or ends. It draws as the engine does, by the same (seed,
position, sample): where both models agree, a sampled token is guessed too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sagellm.batch import Batch, Columns
from sagellm.drafts import NOTHING
from sagellm.engine.load import Progress, load_weights
from sagellm.engine.planner import Planner
from sagellm.models.checkpoint import Checkpoint
from sagellm.runtime.executor import Executor

CHOICE = (
    "seed", "stages", "temperature", "top_k", "top_p", "min_p", "repetition", "presence", "frequency", "prompt",
    "minimum", "stops", "bias_tokens", "bias",
)  # fmt: skip
"""Columns that say how a sequence's tokens are chosen: the engine's own."""
WHOSE = ("number", "sample", "tenant")


class Drafter:
    """A `DraftModel` for the sequences of `engine`, whose columns these are."""

    def __init__(self, planner: Planner, engine: Columns, progress: Progress | None = None):
        self.engine, self.columns, self.compiler = engine, planner.columns, planner.compiler
        self.cost, self.longest = planner.view.step, planner.columns.max_length
        self.steps = 0
        """Forwards of the draft model."""
        self._pool, self._budget = planner.kv.pool, planner.config.max_batched_tokens
        weights = load_weights(
            planner.rank_program().program, Checkpoint(planner.folder), planner.expected, progress
        )
        cache = planner.backend.make_cache(planner.kv_schema, len(self._pool.references))
        self.executor = Executor(planner.backend, self.columns, planner.kv, cache, weights, self._function)

    def _function(self, name: str, words: tuple[str, ...]) -> Callable:
        program = self.compiler.sampler(words) if name == "sample" else self.compiler.model(words).program
        return program[name]

    def behind(self, rows: np.ndarray) -> np.ndarray:
        """[D] tokens of each row, all but the last, that are not in the cache; guesses that did not hold count as if
        they were."""
        c = self.columns
        return np.maximum(self.engine.length[rows] - 1 - np.where(self._ours(rows), c.context[rows], 0), 0)

    def guess(self, rows: np.ndarray, depth: int) -> np.ndarray:
        """int32 [D, depth]: how each row may go on; -1 where it has no room or has not caught up yet."""
        c, guesses = self.columns, np.full((len(rows), depth), NOTHING, np.int32)
        self._follow(rows)
        have = np.flatnonzero(self._room(rows, depth))
        room = self._budget - np.cumsum(c.new[rows[have]]) + c.new[rows[have]]
        c.new[rows[have]] = np.clip(room, 0, c.new[rows[have]])
        going = rows[have[room > 0]]
        ready = have[(c.context + c.new == c.length)[rows[have]] & (room > 0)]
        ends = rows[ready]
        starts = c.length[ends].copy()
        alone = (c.new[going] == 1) & np.isin(going, ends)
        self._step(Batch(c, going[alone], going[~alone]))
        plan = None
        for _ in range(depth - 1 if len(ends) else 0):
            c.new[ends] = 1
            plan = self._step(Batch(c, ends, rows[:0]), plan)
        guesses[ready] = c.tokens[ends[:, None], starts[:, None] + np.arange(depth)]
        return guesses

    def _step(self, batch: Batch, plan=None):
        """One forward; the plan, which serves other steps of as many phases too."""
        if not len(batch.decode) + len(batch.prefill):
            return None
        plan = plan or self.compiler.step(batch).plan
        self.executor.run(plan, batch)
        self.steps += 1
        return plan

    def _ours(self, rows: np.ndarray) -> np.ndarray:
        """Does the cache hold the sequence that the engine has in this row?"""
        return np.all([getattr(self.columns, n)[rows] == getattr(self.engine, n)[rows] for n in WHOSE], 0)

    def _follow(self, rows: np.ndarray) -> None:
        """Take over what the engine knows of these rows; what was cached of other tokens does not count any more."""
        c, engine = self.columns, self.engine
        held = np.flatnonzero(c.owned)
        self._release(held[~self._ours(held)])
        for name in CHOICE:
            setattr(c, name, getattr(engine, name))
        for name in WHOSE:
            getattr(c, name)[rows] = getattr(engine, name)[rows]
        width = int(engine.length[rows].max())
        tokens = engine.tokens[rows, :width]
        other = np.pad(c.tokens[rows, :width] != tokens, ((0, 0), (0, 1)), constant_values=True)
        c.tokens[rows, :width] = tokens
        c.length[rows] = engine.length[rows]
        c.context[rows] = np.minimum(np.minimum(c.context[rows], other.argmax(1)), c.length[rows] - 1)
        c.new[rows] = c.length[rows] - c.context[rows]

    def _room(self, rows: np.ndarray, depth: int) -> np.ndarray:
        """[D] who gets the blocks it needs; rows that are not asked for give up theirs where it is tight."""
        c, pool = self.columns, self._pool
        wanted = np.maximum(-(-(c.length[rows] + depth - 1) // c.block_size) - c.owned[rows], 0)
        if wanted.sum() > pool.free:
            self._release(np.setdiff1d(np.flatnonzero(c.owned), rows))
        return np.cumsum(wanted) <= pool.free

    def _release(self, rows: np.ndarray) -> None:
        c = self.columns
        for row in rows.tolist():
            self._pool.release(c.blocks[row, : c.owned[row]])
            c.blocks[row] = c.owned[row] = c.context[row] = 0
