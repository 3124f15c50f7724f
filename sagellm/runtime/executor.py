"""Executes a step's plan: its calls, bound to the host functions below. It never sees a graph.

Weights, cache and the compiled model functions come from outside; the executor changes the columns only in
`batch.commit`, the pool only in `kv.allocate`; what moves between blocks was decided when the step was planned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from attrs import define, evolve, field, frozen

from sagellm import random
from sagellm.backends.base import Backend, KVCache
from sagellm.backends.plan import ExecutionPlan
from sagellm.batch import AHEAD, Batch, Columns, Phase, Stage
from sagellm.errors import UserError
from sagellm.rows import Rows, build_rows
from sagellm.runtime.kv import KVManager
from sagellm.trees import Trees, slots, tree_rows


@frozen
class GroupRef:
    """The value of `batch.group`: a phase, whether beginnings are shared or read together, the trees of guesses."""

    phase: Phase
    shared: bool = False
    cascade: bool = False
    trees: Trees | None = None


@frozen
class Chosen:
    """The value of `batch.sample`: a token for each output row, and of `spec.verify`: for each node that counts."""

    tokens: np.ndarray
    logits: torch.Tensor
    prompt_logits: torch.Tensor
    nodes: np.ndarray | None = None
    """The nodes that count, sequence after sequence."""


@define
class StepOutcome:
    """What a step did: one entry per token, those of a sequence together and in order."""

    rows: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    """Of the tokens in their sequence."""
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
    trees: Trees | None = None
    """What was guessed, and `nodes`, what of it counts."""
    nodes: np.ndarray | None = None
    vectors: torch.Tensor | None = None
    """[rows, hidden] float32, of a step of prompts whose vectors are wanted; it has no tokens then."""


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
    ranks: Any = None
    """The other ranks that run the model with this one; see `engine/ranks.py`."""
    device_seconds: float = 0.0
    """Spent in model and sampler; whoever reads it sets it back."""
    copies: tuple[int, float] = (0, 0.0)
    """Blocks that were copied from or to host memory, and the seconds it took; likewise."""
    _host: torch.Tensor | None = None
    _batch: Batch | None = None
    _rows: Rows = field(init=False)
    """Of this step."""
    _prompts: tuple[np.ndarray, np.ndarray] = field(init=False)
    _outcome: StepOutcome | None = None
    _bound: dict[int, tuple[ExecutionPlan, list]] = field(factory=dict)

    def run(self, plan: ExecutionPlan, batch: Batch) -> StepOutcome:
        """One step. On an exception the sequences are as before; blocks they got stay theirs."""
        self._batch = batch
        self._begin_step()
        slots: list[Any] = [None] * plan.slots
        with torch.inference_mode():
            for function, inputs, output, static in self._bind(plan):
                value = function(self, *[slots[i] for i in inputs], **static)
                if output is not None:
                    slots[output] = value
        outcome, self._outcome, self._batch = self._outcome, None, None
        assert outcome is not None
        return outcome

    def _begin_step(self) -> None:
        if self.cache.beside is not None:
            self.cache.beside.begin_step()

    def move(self) -> None:
        """Carry out what moves between blocks ahead of the step, whose plan then has no such operation."""
        self._begin_step()
        for name in ("evict", "offload", "fetch", "copy"):
            if getattr(self.kv.moves, name):
                HOST[f"kv.{name}"](self)
        if self.kv.moves.ahead:
            self.offload(when=AHEAD)
        if self.kv.moves.fetch_ahead:
            self.fetch(when=AHEAD)

    @property
    def forwarded(self) -> int:
        """Tokens that go through the model in this step."""
        return self._rows.forwarded

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

    def branch(self, group: GroupRef) -> GroupRef:
        if group.phase is not Phase.DECODE or len(self._batch.prefill):
            raise UserError(
                "spec.branch in a step with prompts; accepted: the group of a step that only decodes"
            )
        return evolve(group, trees=Trees.of(self.columns, self._batch.decode))

    def cascade(self, group: GroupRef) -> GroupRef:
        return evolve(group, cascade=True)

    def evict(self) -> None:
        self.kv.moves.evict.clear()

    def offload(self, when: str = "") -> None:
        began = time.perf_counter()
        blocks, slots = _taken(self.kv.moves.ahead if when == AHEAD else self.kv.moves.offload)
        if when == AHEAD and self.cache.beside is not None:
            # how long it takes cannot be seen here: the others tell
            self.cache.beside.copy(blocks, self._room(), slots)
            return
        values = self.cache.read(blocks)
        self._room(touched=True)[torch.from_numpy(slots)] = values
        self._copied(len(blocks), began)

    def fetch(self, when: str = "") -> None:
        began = time.perf_counter()
        slots, blocks = _taken(self.kv.moves.fetch_ahead if when == AHEAD else self.kv.moves.fetch)
        self.cache.write(blocks, self._room(touched=True)[torch.from_numpy(slots)])
        self._copied(len(blocks), began)

    def _room(self, touched: bool = False) -> torch.Tensor:
        """Blocks in host memory, [slots, ...] as the cache gives them; `touched` by this process, not by the device."""
        beside = self.cache.beside
        if self._host is None:
            like = self.cache.read(np.zeros(1, np.int64))[0]
            shape = self.kv.host.slots, *like.shape
            self._host = torch.empty(shape, dtype=like.dtype, pin_memory=beside is not None)
        if touched and beside is not None:
            beside.wait()
        return self._host

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
        groups = [group for group in arguments if group is not None]
        trees = _trees(groups)
        if trees is not None:
            rows = tree_rows(self._batch, trees)
        else:
            shared, cascade = any(g.shared for g in groups), any(g.cascade for g in groups)
            rows = build_rows(self._batch, shared=shared, cascade=cascade)
        self._rows, self._prompts = rows, (rows.prompt_rows, rows.prompt_positions)
        return self.backend.upload(rows, self.columns.block_size)

    def sampling(self, *groups: GroupRef) -> SimpleNamespace | None:
        c, trees = self.columns, _trees(groups)
        rows = self._batch.output_rows() if trees is None else trees.rows
        if not c.stages[rows].any():
            return None
        lengths = c.length[rows] if trees is None else c.length[rows] + trees.depths
        columns = (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition",
            "presence",
            "frequency",
            "prompt",
        )
        put = self.backend.put
        how = {name: put(getattr(c, name)[rows]) for name in columns}
        longest = int(lengths.max()) if len(rows) else 0
        known = c.tokens[rows, :longest].astype(np.int64) if trees is None else trees.known(c)
        uniform = random.uniform(c.seed[rows], lengths.astype(np.int64), c.sample[rows])
        if (c.stages[rows] & Stage.GRAMMAR).any():
            bound = np.flatnonzero(c.stages[rows] & Stage.GRAMMAR)
            how["grammar_rows"] = put(bound)
            how["allowed"] = put(allowed_tokens(c, rows[bound]))
        if (c.stages[rows] & Stage.TOP_K).any():
            k = c.top_k[rows][c.stages[rows] & Stage.DRAW > 0]
            how["top_k_span"] = int(k.min()), int(k.max())
        if (c.stages[rows] & Stage.BIAS).any():
            some = biases(c, rows, lengths)
            how |= dict(zip(("bias_rows", "bias_tokens", "bias"), map(put, some)))
        return SimpleNamespace(
            tokens=put(known),
            length=put(lengths),
            uniform=put(uniform),
            greedy=how["temperature"] == 0,
            **how,
        )

    def forward(self, rows: Any, model: str, kinds: tuple[str, ...]) -> torch.Tensor:
        function = self.functions(model, kinds)
        if self.ranks is None:
            return self._timed(function, self.weights, self.cache, rows)
        with self.ranks.forwarding(model, kinds, self._rows) as comm:
            return self._timed(function, self.weights, self.cache, comm, rows)

    def sample(
        self, logits: torch.Tensor, how: SimpleNamespace | None, sampler: str, stages: tuple[str, ...]
    ) -> Chosen:
        count = len(logits) - len(self._prompts[0])
        chosen = logits[:count]
        tokens = self._timed(self.functions(sampler, stages), chosen, how)
        return Chosen(tokens.cpu().numpy(), chosen, logits[count:])

    def verify(self, chosen: Chosen, group: GroupRef) -> Chosen:
        nodes = group.trees.accepted(self.columns, chosen.tokens)
        logits = chosen.logits[self.backend.put(nodes)]
        return evolve(chosen, tokens=chosen.tokens[nodes], logits=logits, nodes=nodes)

    def move_accepted(self, chosen: Chosen, group: GroupRef) -> None:
        """Keys and values of the accepted path to their places; blocks that only the rest needed go back."""
        c, trees, nodes = self.columns, group.trees, chosen.nodes
        away = nodes[trees.cells[nodes] != trees.depths[nodes]]
        if len(away):
            rows = trees.rows[away]
            lie, belong = (c.context[rows] + at[away] for at in (trees.cells, trees.depths))
            self.cache.move(slots(c, rows, lie), slots(c, rows, belong))
        members = self._batch.decode
        self.kv.pool.shrink(c, members, c.length[members] + _taken_by(members, trees, nodes))

    def _timed(self, function: Callable, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        self.device_seconds += time.perf_counter() - began
        return result

    def commit(self, chosen: Chosen, *groups: GroupRef) -> None:
        c, batch, trees, nodes = self.columns, self._batch, _trees(groups), chosen.nodes
        if nodes is not None:
            rows, members = trees.rows[nodes], batch.decode
            positions, counts = c.length[rows] + trees.depths[nodes], _taken_by(members, trees, nodes)
            c.context[members] += counts
            c.length[members] += counts
        else:
            rows = batch.output_rows()
            positions = c.length[rows]
            for group in groups:
                members = batch.rows(group.phase)
                c.context[members] += c.new[members]
            c.length[rows] += 1
        c.tokens[rows, positions] = chosen.tokens
        self._outcome = StepOutcome(
            rows, chosen.tokens, positions, self.forwarded, chosen.logits, chosen.prompt_logits,
            *self._prompts, trees, nodes,
        )  # fmt: skip

    def report(self, vectors: torch.Tensor, *groups: GroupRef) -> None:
        c, none = self.columns, np.zeros(0, np.int64)
        rows = self._batch.prefill
        c.context[rows] += c.new[rows]
        self._outcome = StepOutcome(
            rows, none, none, self.forwarded, vectors, vectors[:0], none, none, vectors=vectors
        )


def _trees(groups: Sequence[GroupRef]) -> Trees | None:
    """Of the group that speculates: it is alone in its step."""
    return groups[0].trees if groups else None


def _taken_by(members: np.ndarray, trees: Trees, nodes: np.ndarray) -> np.ndarray:
    """int32: how many of the nodes each sequence has."""
    return np.bincount(trees.rows[nodes], minlength=members.max() + 1)[members].astype(np.int32)


def biases(c: Columns, rows: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is added to the logits of these rows, of these lengths: index among the rows int64 [K], token int64 [K],
    value float32 [K]."""
    wanted = c.bias_tokens[rows] >= 0
    banned = (c.stops[rows] >= 0) & (lengths < c.minimum[rows])[:, None]
    at, banned_at = np.nonzero(wanted)[0], np.nonzero(banned)[0]
    tokens = np.concatenate([c.bias_tokens[rows][wanted], c.stops[rows][banned]]).astype(np.int64)
    values = np.concatenate([c.bias[rows][wanted], np.full(len(banned_at), -np.inf, np.float32)])
    return np.concatenate([at, banned_at]), tokens, values


def allowed_tokens(c: Columns, rows: np.ndarray) -> np.ndarray:
    """bool [rows, V or wider]: what their grammars let come next."""
    return np.unpackbits(c.allowed[rows].view(np.uint8), axis=1, bitorder="little").view(bool)


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
    "batch.cascade": Executor.cascade,
    "kv.allocate": Executor.allocate,
    "batch.rows": Executor.rows,
    "batch.sampling": Executor.sampling,
    "batch.forward": Executor.forward,
    "batch.sample": Executor.sample,
    "spec.branch": Executor.branch,
    "spec.verify": Executor.verify,
    "spec.commit": Executor.move_accepted,
    "batch.commit": Executor.commit,
    "batch.report": Executor.report,
}
