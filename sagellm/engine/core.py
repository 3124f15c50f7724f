"""The core: requests in, token events out, step by step. It speaks token ids only.

Building one is told as stages: folder -> config -> compiled model -> weights -> cache -> executor -> scheduler.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from attrs import define, field, frozen

from sagellm import backends, passes
from sagellm.backends.base import Backend
from sagellm.backends.plan import Program
from sagellm.batch import Batch, Columns, Request
from sagellm.compiler import Compiler, expected_tensors
from sagellm.config import EngineConfig, KVCacheSchema
from sagellm.errors import UserError
from sagellm.models.checkpoint import Checkpoint
from sagellm.models.config import load_config
from sagellm.models.hub import resolve
from sagellm.runtime.executor import Executor, StepOutcome
from sagellm.runtime.pool import BlockPool
from sagellm.runtime.scheduler import Scheduler

Progress = Callable[[str, int, int], None]
"""(what, done, of)"""


@frozen
class TokenEvent:
    """One token of one request."""

    request_id: str
    index: int
    """Position among the request's output tokens, from 0."""
    token: int
    finish_reason: str | None = None
    """`stop` (an end token), `length`, or None while it goes on."""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """Likeliest tokens and their logprobs, best first."""


@define
class Counters:
    """Counted from executed plans."""

    steps: int = 0
    forwarded: int = 0
    """Tokens that went through the model."""
    prompt: int = 0
    """Prompt tokens of the requests that began."""
    generated: int = 0
    remarks: Counter = field(factory=Counter)
    """(pass, applied) -> how often, over the steps executed and the models compiled."""


def load_weights(program: Program, checkpoint: Checkpoint, expected: dict, progress: Progress | None = None):
    """Run the emitted weights program over a checkpoint whose tensors have been checked."""
    checkpoint.check(expected)
    done = 0

    def read(name: str, dtype: torch.dtype) -> torch.Tensor:
        nonlocal done
        done += 1
        if progress:
            progress("weights", done, len(expected))
        return checkpoint.read(name).to(dtype)

    with torch.inference_mode():
        return program["load"](read)


class EngineCore:
    def __init__(self, config: EngineConfig, progress: Progress | None = None):
        self.config = config
        self.pipeline = passes.pipeline(config.pipeline)
        self.backend: Backend = backends.load(config.target)
        self.folder: Path = resolve(config.model)
        self.model = load_config(self.folder, config.model)
        dtype = self.model.dtype if config.dtype == "auto" else config.dtype
        self.backend.capability.check_dtype(dtype)
        self.max_length = self._max_length()
        self.compiler = Compiler(self.model, self.backend, self.pipeline, dtype, config.verify)
        self.counters = Counters()
        self._counted: set[tuple[str, ...]] = set()
        compiled = self.compiler.model(("prefill",))
        expected = expected_tensors(compiled.graph)
        self.weights: SimpleNamespace = load_weights(
            compiled.program, Checkpoint(self.folder), expected, progress
        )
        self.kv_schema = KVCacheSchema(
            dtype=dtype,
            block_size=config.block_size,
            num_layers=self.model.num_layers,
            num_kv_heads=self.model.num_kv_heads,
            head_dim=self.model.head_dim,
        )
        blocks = self._block_count()
        cache = self.backend.make_cache(
            self.model.num_layers,
            blocks,
            config.block_size,
            self.model.num_kv_heads,
            self.model.head_dim,
            dtype,
        )
        self.columns = Columns(config.max_sequences, self.max_length, config.block_size)
        self.pool = BlockPool(blocks)
        self.executor = Executor(self.backend, self.columns, self.pool, cache, self.weights, self._function)
        self.scheduler = Scheduler(self.columns, self.pool, config.max_batched_tokens)
        self._rows: dict[str, int] = {}

    def _max_length(self) -> int:
        asked, limit = self.config.max_length, self.model.max_positions
        if asked is not None and asked > limit:
            raise UserError(f"max_length is {asked}; accepted: at most {limit}, the model's context")
        return asked or limit

    def _block_count(self) -> int:
        """Blocks for every sequence at full length, or what the memory share holds, and one of padding."""
        wanted = self.config.max_sequences * -(-self.max_length // self.config.block_size)
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        share = int(free * self.config.kv_memory_fraction)
        count = min(wanted, share // self.kv_schema.bytes_per_block)
        if count < 1:
            raise UserError(
                f"kv_memory_fraction {self.config.kv_memory_fraction} of {free >> 20} MiB free memory holds no KV "
                f"block of {self.kv_schema.bytes_per_block} bytes; accepted: a larger part or a smaller model"
            )
        return count + 1

    def _function(self, name: str, words: tuple[str, ...]) -> Callable:
        """The compiled function of the model graph for these row kinds or sampling stages."""
        if name == "sample":
            return self.compiler.sampler(words)["sample"]
        compiled = self.compiler.model(words)
        if words not in self._counted:
            self._counted.add(words)
            self.counters.remarks.update((r.pass_name, r.done) for r in compiled.remarks)
        return compiled.program[name]

    # requests

    def submit(self, request: Request) -> None:
        """Queue a request; one that can never run is refused at once."""
        if request.id in self._rows or any(request.id == waiting.id for waiting, _ in self.scheduler.waiting):
            raise UserError(f"request id {request.id!r} is in use; accepted: a new one")
        if not all(0 <= token < self.model.vocab_size for token in request.prompt):
            bad = next(token for token in request.prompt if not 0 <= token < self.model.vocab_size)
            raise UserError(f"token id {bad} in the prompt; accepted: 0 to {self.model.vocab_size - 1}")
        seed = self.config.seed if request.sampling.seed is None else request.sampling.seed
        self.scheduler.submit(request, seed)

    @property
    def busy(self) -> bool:
        return self.scheduler.busy

    def abort(self, request_id: str) -> bool:
        """End a request wherever it is; False if there is none of this id."""
        for entry in self.scheduler.waiting:
            if entry[0].id == request_id:
                self.scheduler.waiting.remove(entry)
                return True
        if request_id not in self._rows:
            return False
        self.scheduler.finish(self._rows.pop(request_id))
        return True

    def schedule(self) -> Batch:
        """Stages admit and decide: the next step's batch, with what the passes decided about it."""
        batch = self.scheduler.schedule()
        self.pipeline.decide(batch)
        return batch

    def execute(self, batch: Batch) -> StepOutcome:
        """Stages lower, execute and commit."""
        step = self.compiler.step(batch)
        outcome = self.executor.run(step.plan, batch)
        self.counters.steps += 1
        self.counters.forwarded += outcome.forwarded
        self.counters.remarks.update((r.pass_name, r.done) for r in step.remarks)
        return outcome

    def step(self) -> list[TokenEvent]:
        """One step of the engine; its token events."""
        batch = self.schedule()
        for row in batch.prefill[self.columns.context[batch.prefill] == 0].tolist():
            self._rows[self.scheduler.requests[row].id] = row
            self.counters.prompt += int(self.columns.prompt[row])
        outcome = self.execute(batch)
        return [self._event(i, outcome) for i in range(len(outcome.rows))]

    def _event(self, index: int, outcome: StepOutcome) -> TokenEvent:
        row, token = int(outcome.rows[index]), int(outcome.tokens[index])
        request = self.scheduler.requests[row]
        how = request.sampling
        produced = int(self.columns.length[row] - self.columns.prompt[row])
        self.counters.generated += 1
        ends = (not how.ignore_eos and token in self.model.eos_token_ids) or token in how.stop_token_ids
        reason = "stop" if ends else None
        if reason is None and self.columns.length[row] >= self.scheduler.limit(request):
            reason = "length"
        logprob, top = None, ()
        if how.logprobs is not None:
            logprob, listed = outcome.logprobs(index, how.logprobs)
            top = tuple(listed)
        if reason is not None:
            self.scheduler.finish(row)
            del self._rows[request.id]
        return TokenEvent(request.id, produced - 1, token, reason, logprob, top)
