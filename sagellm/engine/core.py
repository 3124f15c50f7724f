"""The core: requests in, token events out, step by step. It speaks token ids only.

Building one is told as stages: planner (folder, config, compiler) -> weights -> cache -> executor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

from attrs import define, field, frozen

from sagellm.batch import Batch
from sagellm.compiler import expected_tensors
from sagellm.config import EngineConfig
from sagellm.engine.load import Progress, load_weights
from sagellm.engine.planner import Planner
from sagellm.engine.record import begin_recording
from sagellm.models.checkpoint import Checkpoint
from sagellm.runtime.executor import Executor, StepOutcome


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
    shared: int = 0
    """Prompt tokens that did not, because another sequence of the step computed them."""
    generated: int = 0
    remarks: Counter = field(factory=Counter)
    """(pass, applied) -> how often, over the steps executed and the models compiled."""


class EngineCore(Planner):
    """A planner that has the weights and executes its plans."""

    def __init__(self, config: EngineConfig, progress: Progress | None = None):
        super().__init__(config)
        self.counters = Counters()
        self._counted: set[tuple[str, ...]] = set()
        compiled = self.compiler.model(("prefill",))
        expected = expected_tensors(compiled.graph)
        self.weights: SimpleNamespace = load_weights(
            compiled.program, Checkpoint(self.folder), expected, progress
        )
        self.cache = self.backend.make_cache(self.kv_schema, len(self.pool.references))
        self.executor = Executor(
            self.backend, self.columns, self.pool, self.cache, self.weights, self._function
        )

    def _function(self, name: str, words: tuple[str, ...]) -> Callable:
        """The compiled function of the model graph for these row kinds or sampling stages."""
        if name == "sample":
            return self.compiler.sampler(words)["sample"]
        compiled = self.compiler.model(words)
        if words not in self._counted:
            self._counted.add(words)
            self.counters.remarks.update((r.pass_name, r.done) for r in compiled.remarks)
        return compiled.program[name]

    @property
    def busy(self) -> bool:
        return self.scheduler.busy

    def abort(self, request_id: str) -> bool:
        """End a request wherever it is; False if there is none of this id."""
        return self.scheduler.abort(request_id)

    def execute(self, batch: Batch) -> StepOutcome:
        """Stages lower, execute and commit."""
        step = self.compiler.step(batch)
        finish = begin_recording(self, batch) if self.config.record else None
        outcome = self.executor.run(step.plan, batch)
        if finish:
            finish(outcome)
        self.counters.steps += 1
        self.counters.forwarded += outcome.forwarded
        self.counters.shared += batch.new_tokens - outcome.forwarded
        self.counters.remarks.update((r.pass_name, r.done) for r in step.remarks)
        return outcome

    def step(self) -> list[TokenEvent]:
        """One step of the engine; its token events, none where there is nothing to do."""
        if not self.busy:
            return []
        batch = self.schedule()
        began = batch.prefill[self.columns.context[batch.prefill] == 0]
        self.counters.prompt += int(self.columns.prompt[began].sum())
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
        return TokenEvent(request.id, produced - 1, token, reason, logprob, top)
