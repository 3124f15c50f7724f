"""Executes a step's plan: its calls, bound to the host functions below. It never sees a graph.

Weights, cache and the compiled model functions come from outside; the executor changes the columns only in
`batch.commit`, the pool only in `kv.allocate`; what moves between blocks was decided when the step was planned.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from attrs import define, evolve, field, frozen

from sagellm import random
from sagellm.backends.base import Backend, KVCache
from sagellm.backends.plan import ExecutionPlan
from sagellm.batch import AHEAD, Batch, Columns, Phase, Stage
from sagellm.rows import build_rows
from sagellm.runtime.kv import KVManager


@frozen
class GroupRef:
    """The value of `batch.group`: a phase of the batch, and whether beginnings are shared."""

    phase: Phase
    shared: bool = False


@define
class StepOutcome:
    """What a step did: one entry per sequence that got a token."""

    rows: np.ndarray
    tokens: np.ndarray
    forwarded: int
    """Tokens that went through the model."""
    logits: torch.Tensor
    """[R, V] float32, before sampling."""
    prompt_logits: torch.Tensor
    """[E, V] float32, of prompts whose logprobs are wanted."""
    prompt_rows: np.ndarray
    """[E] their rows."""
    prompt_positions: np.ndarray
    """[E] positions; the logits are about the token behind."""


Functions = Callable[[str, tuple[str, ...]], Callable]
"""(`model` or `sample`, row kinds or stages) -> the compiled function."""


@define
class Executor:
    backend: Backend
    columns: Columns
    kv: KVManager
    cache: KVCache
    weights: Any
    functions: Functions
    device_seconds: float = 0.0
    """Spent in model and sampler; whoever reads it sets it back."""
    copies: tuple[int, float] = (0, 0.0)
    """Blocks that were copied from or to host memory, and the seconds it took; likewise."""
    _host: torch.Tensor | None = None
    """Blocks in host memory, [slots, ...] as the cache gives them."""
    _batch: Batch | None = None
    _forwarded: int = 0
    _prompts: tuple[np.ndarray, np.ndarray] = field(init=False)
    _outcome: StepOutcome | None = None
    _bound: dict[int, tuple[ExecutionPlan, list]] = field(factory=dict)

    def run(self, plan: ExecutionPlan, batch: Batch) -> StepOutcome:
        """One step. On an exception the sequences are as before; blocks they got stay theirs."""
        self._batch = batch
        slots: list[Any] = [None] * plan.slots
        with torch.inference_mode():
            for function, inputs, output, static in self._bind(plan):
                value = function(self, *[slots[i] for i in inputs], **static)
                if output is not None:
                    slots[output] = value
        outcome, self._outcome, self._batch = self._outcome, None, None
        assert outcome is not None
        return outcome

    def move(self) -> None:
        """Carry out what moves between blocks ahead of the step, whose plan then has no such operation."""
        for name in ("evict", "offload", "fetch", "copy"):
            if getattr(self.kv.moves, name):
                HOST[f"kv.{name}"](self)
        if self.kv.moves.ahead:
            self.offload(when=AHEAD)

    def _bind(self, plan: ExecutionPlan) -> list:
        found = self._bound.get(id(plan))
        if found is None:
            calls = [
                (HOST[call.op], call.inputs, call.outputs[0] if call.outputs else None, dict(call.static))
                for call in plan.calls
            ]
            found = self._bound[id(plan)] = (plan, calls)
        return found[1]

    # host functions, by the name of their operation

    def group(self, phase: str) -> GroupRef:
        return GroupRef(Phase[phase.upper()])

    def share(self, group: GroupRef) -> GroupRef:
        return evolve(group, shared=True)

    def evict(self) -> None:
        self.kv.moves.evict.clear()

    def offload(self, when: str = "") -> None:
        began = time.perf_counter()
        blocks, slots = _taken(self.kv.moves.ahead if when == AHEAD else self.kv.moves.offload)
        values = self.cache.read(blocks)
        if self._host is None:
            self._host = values.new_empty((self.kv.host.slots, *values.shape[1:]))
        self._host[torch.from_numpy(slots)] = values
        self._copied(len(blocks), began)

    def fetch(self) -> None:
        began = time.perf_counter()
        slots, blocks = _taken(self.kv.moves.fetch)
        self.cache.write(blocks, self._host[torch.from_numpy(slots)])
        self._copied(len(blocks), began)

    def _copied(self, blocks: int, began: float) -> None:
        before, seconds = self.copies
        self.copies = before + blocks, seconds + time.perf_counter() - began

    def copy(self) -> None:
        self.cache.copy(*_taken(self.kv.moves.copy))

    def allocate(self, *groups: GroupRef) -> None:
        pool = self.kv.pool
        for group in groups:
            extend = pool.extend_shared if group.shared else pool.extend
            taken = extend(self.columns, self._batch.rows(group.phase))
            if len(taken):
                self.cache.clear(taken)

    def rows(self, *arguments: GroupRef | None) -> Any:
        shared = any(group is not None and group.shared for group in arguments)
        rows = build_rows(self._batch, shared=shared)
        self._forwarded, self._prompts = rows.forwarded, (rows.prompt_rows, rows.prompt_positions)
        return self.backend.upload(rows, self.columns.block_size)

    def sampling(self, *groups: GroupRef) -> SimpleNamespace | None:
        c, rows = self.columns, self._batch.output_rows()
        if not c.stages[rows].any():
            return None
        columns = (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition",
            "presence",
            "frequency",
            "prompt",
            "length",
        )
        how = {name: torch.from_numpy(getattr(c, name)[rows]) for name in columns}
        longest = int(c.length[rows].max()) if len(rows) else 0
        uniform = random.uniform(c.seed[rows], c.length[rows].astype(np.int64), c.sample[rows])
        if c.stages[rows].max() >= Stage.BIAS:
            how |= dict(zip(("bias_rows", "bias_tokens", "bias"), map(torch.from_numpy, biases(c, rows))))
        return SimpleNamespace(
            tokens=torch.from_numpy(c.tokens[rows, :longest].astype(np.int64)),
            uniform=torch.from_numpy(uniform),
            greedy=how["temperature"] == 0,
            **how,
        )

    def forward(self, rows: Any, model: str, kinds: tuple[str, ...]) -> torch.Tensor:
        return self._timed(self.functions(model, kinds), self.weights, self.cache, rows)

    def sample(
        self, logits: torch.Tensor, how: SimpleNamespace | None, sampler: str, stages: tuple[str, ...]
    ):
        count = len(logits) - len(self._prompts[0])
        chosen = logits[:count]
        return (chosen, logits[count:]), self._timed(self.functions(sampler, stages), chosen, how)

    def _timed(self, function: Callable, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        self.device_seconds += time.perf_counter() - began
        return result

    def commit(self, sampled: tuple[torch.Tensor, torch.Tensor], *groups: GroupRef) -> None:
        c, batch = self.columns, self._batch
        (logits, prompt_logits), tokens = sampled
        chosen, rows = tokens.numpy(), batch.output_rows()
        for group in groups:
            members = batch.rows(group.phase)
            c.context[members] += c.new[members]
        c.tokens[rows, c.length[rows]] = chosen
        c.length[rows] += 1
        self._outcome = StepOutcome(rows, chosen, self._forwarded, logits, prompt_logits, *self._prompts)


def biases(c: Columns, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is added to the logits of these rows: index among the rows int64 [K], token int64 [K], value float32 [K]."""
    wanted = c.bias_tokens[rows] >= 0
    banned = (c.stops[rows] >= 0) & (c.length[rows] < c.minimum[rows])[:, None]
    at, banned_at = np.nonzero(wanted)[0], np.nonzero(banned)[0]
    tokens = np.concatenate([c.bias_tokens[rows][wanted], c.stops[rows][banned]]).astype(np.int64)
    values = np.concatenate([c.bias[rows][wanted], np.full(len(banned_at), -np.inf, np.float32)])
    return np.concatenate([at, banned_at]), tokens, values


def _taken(moves: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Both columns of the moves, which are none of the next step's then."""
    first, second = np.array(moves, np.int64).T
    moves.clear()
    return first, second


HOST: dict[str, Callable] = {
    "kv.evict": Executor.evict,
    "kv.offload": Executor.offload,
    "kv.fetch": Executor.fetch,
    "kv.copy": Executor.copy,
    "batch.group": Executor.group,
    "batch.share": Executor.share,
    "kv.allocate": Executor.allocate,
    "batch.rows": Executor.rows,
    "batch.sampling": Executor.sampling,
    "batch.forward": Executor.forward,
    "batch.sample": Executor.sample,
    "batch.commit": Executor.commit,
}
