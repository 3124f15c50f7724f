"""The core: requests in, token events out, step by step. It speaks token ids only.

Building one is told as stages: planner (folder, config, compiler) -> weights -> cache -> executor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from attrs import evolve

from sagellm import backends
from sagellm.backends.base import KVCache, require_device
from sagellm.batch import Batch, Request, Stage
from sagellm.config import EngineConfig
from sagellm.engine.drafter import Drafter
from sagellm.engine.events import ERROR, LENGTH, NOTHING, REASONS, STOP, Began, Failed, StepEvents, Token
from sagellm.engine.grammars import Grammars, RowGrammars
from sagellm.engine.history import History
from sagellm.engine.load import Progress, load_weights
from sagellm.engine.planner import Planner
from sagellm.engine.ranks import Ranks, ShardedCache, share_cores
from sagellm.engine.record import begin_recording
from sagellm.engine.stats import Counters, EngineStats, Times
from sagellm.engine.tokenizer import TOKENIZER_FILE, Tokenizer
from sagellm.errors import RankLost, UserError
from sagellm.models.checkpoint import Checkpoint
from sagellm.runtime import logprobs
from sagellm.runtime.executor import Executor, StepOutcome
from sagellm.runtime.swap import SwapOrRecompute
from sagellm.runtime.trials import Trials

log = logging.getLogger(__name__)


class EngineCore(Planner):
    """A planner that has the weights and executes its plans."""

    def __init__(self, config: EngineConfig, progress: Progress | None = None):
        require_device(backends.load(config.target))
        super().__init__(config)
        self.counters, self.times, self.trials = Counters(), Times(), Trials()
        self.history = History(config.explain_steps)
        self._counted: set[tuple[str, ...]] = set()
        self._captured: dict[tuple[str, tuple[str, ...]], Callable] = {}
        compiled, ranks = self.rank_program(), config.tensor_parallel
        share_cores(ranks)
        self.ranks = Ranks(self) if ranks > 1 else None
        self.weights: SimpleNamespace = load_weights(
            compiled.program,
            Checkpoint(self.folder),
            self.expected,
            progress,
            ranks=ranks,
            device=self.backend.capability.device,
        )
        self.cache: KVCache = self.backend.make_cache(self.rank_schema, len(self.kv.pool.references))
        if self.ranks is not None:
            self.ranks.await_ready()
            self.cache = ShardedCache(self.cache, self.ranks, self.kv_schema.num_kv_heads)
        block = self.kv_schema
        self.swap = SwapOrRecompute(
            copy=self.backend.costs.seconds(moved=2 * block.bytes_per_block, calls=2),
            compute=self.backend.costs.seconds(
                flops=2 * self.parameters * block.block_size, dtype=self.dtype
            ),
        )
        self.executor = Executor(
            self.backend, self.columns, self.kv, self.cache, self.weights, self._function, self.ranks
        )
        self.drafter = None if self.draft is None else Drafter(self.draft, self.columns, progress)
        self.view = evolve(self.view, draft_model=self.drafter)
        self._executors = [self.executor, *([self.drafter.executor] if self.drafter else [])]

        has_text = (self.folder / TOKENIZER_FILE).exists()
        self.grammars = RowGrammars(
            self.columns,
            Grammars(
                (lambda: Tokenizer.load(self.folder)) if has_text else None,
                self.model.vocab_size,
                self.model.eos_token_ids,
            ),
        )

    def submit(self, request: Request, number: int | None = None, *, again: bool = False) -> int:
        """As the planner's; a grammar that cannot be followed is refused too."""
        grammar = request.sampling.grammar
        if grammar is not None:
            self.grammars.grammars.matcher(grammar)
        return super().submit(request, number, again=again)

    def ended(self, request: Request) -> dict[int, str]:
        """Samples whose whole output the request brings, and how each ends. UserError for what follows an end."""
        how, found = request.sampling, {}
        stops = {*how.stop_token_ids, *(() if how.ignore_eos else self.model.eos_token_ids)}
        most = min(how.max_tokens, self.columns.max_length - len(request.prompt))
        for sample, output in enumerate(request.output):
            if not output or sample in request.ended:
                continue
            if early := stops.intersection(output[:-1]):
                raise UserError(
                    f"resume goes on behind token {min(early)}, which ends it; accepted: an output up to its end"
                )
            if output[-1] in stops:
                found[sample] = REASONS[STOP]
            elif len(output) >= most:
                found[sample] = REASONS[LENGTH]
            elif how.grammar is not None:
                ends = stops if len(output) < how.min_tokens else ()
                if self.grammars.grammars.ended(how.grammar, output, ends):
                    found[sample] = REASONS[STOP]
        return found

    def _function(self, name: str, words: tuple[str, ...]) -> Callable:
        """The compiled function of the model graph for these row kinds or sampling stages."""
        if name == "sample":
            return self.compiler.sampler(words)["sample"]
        pooling = name.removeprefix("embed_")
        if pooling != name:
            return self.compiler.embedder(words, pooling).program[name]
        compiled = self.compiler.model(words, self.executor.forwarded)
        if words not in self._counted:
            self._counted.add(words)
            self.counters.remarks.update((r.pass_name, r.done) for r in compiled.remarks)
        if self.config.enforce_eager or self.ranks is not None:
            return compiled.program[name]
        if (name, words) not in self._captured:
            self._captured[name, words] = self.backend.captured(compiled.program[name], words)
        return self._captured[name, words]

    def close(self) -> None:
        """End the other ranks, if there are any."""
        if self.ranks is not None:
            self.ranks.close()

    @property
    def busy(self) -> bool:
        return self.scheduler.busy

    def abort(self, request_id: str, sample: int | None = None) -> bool:
        """End a request, or one sample of it, wherever it is; False if there is none of this id."""
        if sample is None:
            ended = self.scheduler.abort(request_id)
        else:
            ended = self.scheduler.drop_sample(request_id, sample)
        self.counters.finished["abort"] += len(ended)
        return bool(ended)

    def step(self) -> list[Token]:
        """One step of the engine; its token events, none where there is nothing to do."""
        names = {number: name for name, number in self.scheduler.numbers.items()}
        return list(self.advance().events(names))

    def advance(self) -> StepEvents:
        """One step of the engine, as columns."""
        if not self.busy:
            return NOTHING
        began = time.perf_counter()
        for executor in self._executors:
            executor.device_seconds = 0.0
        batch = self.schedule()
        if not len(batch.decode) and not len(batch.prefill):
            return NOTHING  # those whose turn it was gave way to others
        now = self.scheduler.clock()
        started = self._note_begun(now)
        tried = self._try_without(batch)
        ran = time.perf_counter()
        results, failed = self._run(batch)
        if tried is not None and not failed:
            self._judge(tried, results, time.perf_counter() - ran)
        events = [self._settle(part, outcome) for part, outcome in results]
        took = time.perf_counter() - began
        if self.kv.host is not None:
            self._compare_ways_back(sum(outcome.forwarded for _, outcome in results))
        self.times.step.add_one(took)
        self.times.host.add_one(took - sum(executor.device_seconds for executor in self._executors))
        return _merged(events, started, failed)

    def _try_without(self, batch: Batch) -> tuple[str, str, int] | None:
        """Where a fact may be left out, it sometimes is, and in all steps once that is faster. What is measured."""
        for p in reversed(self.pipeline.deciding):  # one may have set aside what those before it decided
            for fact in p.optional:
                phase = next((phase for phase, facts in batch.facts.items() if fact in facts), None)
                if phase is None or p.name in batch.probes:
                    continue
                key = p.name, fact, 1 << (len(batch.rows(phase)) - 1).bit_length()
                trial = self.trials.of(key, p.uneven)
                if trial.leave_out():
                    p.leave_out(batch, fact)
                if not trial.off:
                    return key
        return None

    def _judge(
        self, tried: tuple[str, str, int], results: list[tuple[Batch, StepOutcome]], seconds: float
    ) -> None:
        """A draft model's steps count where its guesses were used; what deciding takes is the same in all steps."""
        trial, (name, fact, rows) = self.trials.of(tried), tried
        if self.drafter is not None and any(outcome.trees is not None for _, outcome in results):
            seconds += self.drafter.executor.device_seconds
        each = sum(len(o.rows) for _, o in results) / sum(len(np.unique(o.rows)) for _, o in results)
        if trial.took(seconds, each):
            self.counters.remarks[name, False] += 1
            log.warning(
                "%s: declined at steps of up to %d rows: %s made them slower (measured: %+.1f us%s)",
                name, rows, fact, trial.gain * 1e6, " a token" if trial.uneven else "",
            )  # fmt: skip

    def _compare_ways_back(self, forwarded: int) -> None:
        """What the step's copies and its prefill took says whether blocks that leave are worth a copy."""
        blocks, seconds = self.executor.copies
        self.executor.copies = 0, 0.0
        if blocks:
            self.swap.copied(blocks, seconds)
        if forwarded >= 4 * max(self.columns.block_size, self.scheduler.running):
            self.swap.computed(forwarded / self.columns.block_size, self.executor.device_seconds)
        self.kv.keep_on_host = self.swap.swap

    def _note_begun(self, now: float) -> list[Began]:
        begun, self.scheduler.counts.began = self.scheduler.counts.began, []
        started = []
        for s in begun:
            if s.row < 0:
                continue
            fresh = s.computed == 0
            if fresh:
                self.counters.prompt += len(s.request.prompt)
                self.times.queue.add_one(now - s.arrived)
            if self.history.steps and s.sample == 0:
                fates = self.kv.index.fates(self.kv.chain(s.request.salt), s.known, self.kv.host)
                self.history.looked_up(s.request.id, fates)
            started.append(Began(s.number, s.sample, s.hit, s.miss, now - s.arrived))
        return started

    def _run(self, batch: Batch) -> tuple[list[tuple[Batch, StepOutcome]], list[Failed]]:
        """Execute a batch. Where it raises, its halves are tried, so that only those fail that cannot run."""
        try:
            return [(batch, self.execute(batch))], []
        except (UserError, RankLost):
            raise
        except Exception as error:
            self.counters.failed_steps += 1
            rows = np.concatenate([batch.decode, batch.prefill])
            if len(rows) == 1:
                sequence = self.scheduler.sequences[int(rows[0])]
                message = f"{type(error).__name__}: {error}"
                log.exception("request %s failed in step %d", sequence.request.id, self.counters.steps)
                self.scheduler.finish(int(rows[0]))
                self.counters.finished["error"] += 1
                return [], [Failed(sequence.number, sequence.sample, message)]
            log.warning("a step of %d sequences raised %r; its halves are tried", len(rows), error)
        results, failed = [], []
        for half in np.array_split(rows, 2):
            part = Batch(batch.columns, *(r[np.isin(r, half)] for r in (batch.decode, batch.prefill)))
            part.moves = batch.moves
            self.pipeline.decide(part, self.view)
            done, lost = self._run(part)
            results += done
            failed += lost
        return results, failed

    def _check_passes(self, batch: Batch) -> None:
        """Do the passes keep what this batch means? Reported, not raised: the batch runs all the same."""
        from sagellm.meaning.check import MeaningChanged, check_batch

        try:
            check_batch(self, batch)
            self.counters.checked["equal"] += 1
        except MeaningChanged as error:
            self.counters.checked["different"] += 1
            log.error("step %d: %s", self.counters.steps, error)

    def execute(self, batch: Batch) -> StepOutcome:
        """Stages lower, execute and commit."""
        finish = None
        self._prepare_grammars(batch)
        checks = self.config.check_passes and not batch.pooling
        if checks and self.counters.steps % self.config.check_passes == 0:
            self._check_passes(batch)
        if self.config.record and not batch.pooling:
            self.executor.move()
            finish = begin_recording(self, batch)
        graph, hits = None, self.compiler.counts.hits
        if self.history.steps:
            graph = self.history.lowered(self, batch)
        step = self.compiler.step(batch)
        began, device = time.perf_counter(), self.executor.device_seconds
        c, prefill = self.columns, batch.prefill
        again = int(np.clip(c.computed[prefill] - c.context[prefill], 0, c.new[prefill]).sum())
        outcome = self.executor.run(step.plan, batch)
        if finish:
            finish(outcome)
        if graph is not None:
            rows = np.concatenate([batch.decode, batch.prefill]).tolist()
            self.history.add(
                self, batch, graph, step, (self.scheduler.sequences[row].request.id for row in rows),
                self.counters.steps, outcome.forwarded, self.compiler.counts.hits > hits,
                time.perf_counter() - began, self.executor.device_seconds - device,
            )  # fmt: skip
        self.counters.steps += 1
        self.counters.forwarded += outcome.forwarded
        self.counters.shared += batch.new_tokens - outcome.forwarded
        self.counters.recomputed += again
        self.counters.remarks.update((r.pass_name, r.done) for r in step.remarks)
        if outcome.trees is not None:
            self.view.drafts.learn(outcome.trees, outcome.nodes)
            sequences = len(batch.decode)
            self.counters.verify_steps += 1
            self.counters.drafted += len(outcome.trees.rows) - sequences
            self.counters.accepted += len(outcome.nodes) - sequences
        return outcome

    def _settle(self, batch: Batch, outcome: StepOutcome) -> StepEvents:
        """After the commit: who ended, what is reported, what others may find."""
        c, rows, tokens = self.columns, outcome.rows, outcome.tokens
        self.scheduler.committed(batch)
        if outcome.vectors is not None:
            return self._settle_vectors(rows, outcome.vectors)
        reasons = np.where((c.stops[rows] == tokens[:, None]).any(1), STOP, 0)
        positions = outcome.positions
        reasons = np.where((reasons == 0) & (positions + 1 >= c.limit[rows]), LENGTH, reasons).astype(np.int8)
        numbers, samples, indices = c.number[rows], c.sample[rows], positions - c.prompt[rows]
        failed = self._follow_grammars(rows, tokens, reasons)
        told = logprobs.of_tokens(outcome, c), logprobs.of_prompts(outcome, c)
        self.counters.generated += len(rows)
        self._time(rows)
        for i in np.flatnonzero(reasons).tolist():
            row = int(rows[i])
            made = int(indices[i]) - len(self.scheduler.sequences[row].request.brought(int(samples[i])))
            if made > 0:
                self.times.tpot.add_one((c.last_token[row] - c.first_token[row]) / made)
            self.view.drafts.ended(row)
            self.scheduler.finish(row)
            self.counters.finished[REASONS[reasons[i]]] += 1
        return StepEvents(numbers, samples, indices, tokens, reasons, *told, failed=failed)

    def _settle_vectors(self, rows: np.ndarray, vectors: torch.Tensor) -> StepEvents:
        told = dict(zip(self.columns.number[rows].tolist(), vectors.numpy()))
        for row in rows.tolist():
            self.scheduler.finish(row)
        self.counters.finished[REASONS[STOP]] += len(rows)
        columns = (getattr(NOTHING, name) for name in StepEvents.COLUMNS)
        return StepEvents(*columns, vectors=told)

    def _prepare_grammars(self, batch: Batch) -> None:
        rows = batch.output_rows()
        bound = rows[self.columns.stages[rows] & Stage.GRAMMAR > 0].tolist()
        if bound:
            self.grammars.prepare(bound, lambda row: self.scheduler.sequences[row].request.sampling.grammar)

    def _follow_grammars(self, rows: np.ndarray, tokens: np.ndarray, reasons: np.ndarray) -> list[Failed]:
        """Move the matchers on. Where nothing can follow the output ends, by `reasons`, and where a matcher fails."""
        c, failed = self.columns, []
        for i in np.flatnonzero((c.stages[rows] & Stage.GRAMMAR > 0) & (reasons == 0)).tolist():
            row = int(rows[i])
            over, why = self.grammars.advance(row, int(tokens[i]))
            if why:
                failed.append(Failed(int(c.number[row]), int(c.sample[row]), why))
                self.scheduler.finish(row)
                self.counters.finished[REASONS[ERROR]] += 1
            elif over:
                reasons[i] = STOP
        return failed

    def _time(self, rows: np.ndarray) -> None:
        """The first token is the first of this core: what a request brings was made elsewhere."""
        now, c = self.scheduler.clock(), self.columns
        follows = np.zeros(len(rows), bool)
        follows[1:] = rows[1:] == rows[:-1]
        first = (c.first_token[rows] == 0) & ~follows
        if first.any():
            fresh = rows[first]
            self.times.ttft.add(now - c.arrived[fresh])
            c.first_token[fresh] = now
        if not first.all():
            gaps = np.where(follows, 0.0, now - c.last_token[rows])
            self.times.itl.add(gaps[~first])
        c.last_token[rows] = now

    def stats(self) -> EngineStats:
        scheduler, kv, count = self.scheduler, self.kv, self.counters
        return EngineStats(
            running=scheduler.running,
            waiting=scheduler.waiting,
            kv_use=kv.pool.used / kv.pool.total,
            kv_blocks=kv.pool.total,
            kv_blocks_used=kv.pool.used,
            kv_blocks_cached=kv.pool.idle,
            host_blocks=kv.host.slots if kv.host else 0,
            host_blocks_used=len(kv.host) if kv.host else 0,
            steps=count.steps,
            forwarded=count.forwarded,
            prompt=count.prompt,
            generated=count.generated,
            shared=count.shared,
            reused=kv.counts.hit,
            fetched=kv.counts.fetched,
            recomputed=count.recomputed,
            verify_steps=count.verify_steps,
            drafted=count.drafted,
            accepted=count.accepted,
            draft_steps=self.drafter.steps if self.drafter else 0,
            evicted=dict(kv.counts.evicted),
            offloaded_blocks=kv.counts.offloaded,
            copied_blocks=kv.counts.copied,
            preemptions=scheduler.counts.preemptions,
            refused=scheduler.counts.refused,
            finished=dict(count.finished),
            failed_steps=count.failed_steps,
            checked=dict(count.checked),
            gains={" ".join(map(str, key)): gain for key, gain in self.trials.gains().items()},
            plan_hits=self.compiler.counts.hits,
            plan_misses=self.compiler.counts.misses,
            remarks={
                p.name: {"applied": count.remarks[p.name, True], "declined": count.remarks[p.name, False]}
                for p in self.pipeline.passes
            },
            times={name: getattr(self.times, name).summary() for name in Times.__slots__ if name[0] != "_"},
        )


def _merged(parts: list[StepEvents], began: list[Began], failed: list[Failed]) -> StepEvents:
    failed = [*failed, *(one for part in parts for one in part.failed)]
    if len(parts) == 1:
        (one,) = parts
        return StepEvents(
            one.numbers, one.samples, one.indices, one.tokens, one.reasons, one.logprobs,
            one.prompt_logprobs, began, failed, one.vectors,
        )  # fmt: skip
    if not parts:
        parts = [NOTHING]
    chosen, prompts, vectors, at = {}, {}, {}, 0
    for part in parts:
        vectors |= part.vectors
        chosen |= {at + i: value for i, value in part.logprobs.items()}
        prompts |= part.prompt_logprobs
        at += len(part)
    columns = (np.concatenate([getattr(part, name) for part in parts]) for name in StepEvents.COLUMNS)
    return StepEvents(*columns, chosen, prompts, began, failed, vectors)
