"""What the engine is made to do over a vendor's calls, with the logits of every token as the result.

Prompts in chunks, several in a batch, beginnings shared inside a batch and found in the cache, steps of decodes and
mixed ones, decodes that read a beginning together, trees of guesses, sequences that are put back as the cache is
too small for all, and blocks that go to host memory and come back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from attrs import define, evolve, field
from torch import Tensor

from sagellm.batch import Batch, Request, SamplingParams
from sagellm.config import EngineConfig
from sagellm.engine.core import EngineCore
from sagellm.engine.events import Failed
from sagellm.runtime.executor import StepOutcome
from sagellm.runtime.swap import SwapOrRecompute
from sagellm.target import CostModel, StepCost

FREE_CALLS = CostModel(call=0, source="so that passes act on small batches")
KINDS = ("decode", "prefill", "shared", "cascade", "tree")


Watch = Callable[[EngineCore, tuple[str, ...], Callable], Callable]
"""(core, kinds of rows, function of the model) -> the function to call."""


BLOCKS = {16: 43, 64: 10, 128: 9}
"""KV blocks by their size: so few that one sequence of the second wave is put back."""


class SmallCore(EngineCore):
    """A core with few KV blocks, in which an exception is a finding and not a request that fails."""

    def _block_count(self) -> int:
        size = self.kv_schema.block_size
        return BLOCKS.get(size, max(BLOCKS[128], BLOCKS[16] * 16 // size)) + 1

    def _run(self, batch: Batch) -> tuple[list[tuple[Batch, StepOutcome]], list[Failed]]:
        return [(batch, self.execute(batch))], []


@define
class Transcript:
    """What came out."""

    logits: dict[tuple[int, int, int], Tensor] = field(factory=dict)
    """(request, sample, position) -> float32 [V] before the token at this position was chosen."""
    tokens: dict[tuple[int, int], list[int]] = field(factory=dict)
    kinds: Counter[tuple[str, ...]] = field(factory=Counter)
    """How often rows of these kinds were forwarded."""
    source: str = ""
    """The emitted text of a mixed step."""
    preempted: int = 0
    reused: int = 0


def run(target: str, folder: Path, dtype: str, *, watch: Watch | None = None, **settings) -> Transcript:
    """Serve the scenario's requests with a backend. `watch` may wrap the functions of the model."""
    config = EngineConfig(
        model=str(folder),
        target=target,
        dtype=dtype,
        max_sequences=8,
        max_batched_tokens=256,
        max_length=448,
        host_kv_gib=0.02,
        **settings,
    )
    core, told = SmallCore(config), Transcript()
    step = StepCost.of(FREE_CALLS, core.parameters, core.model.num_layers, core.dtype)
    core.view = evolve(core.view, costs=FREE_CALLS, step=step)
    core.pipeline.prepare(core.view)
    core.swap = SwapOrRecompute(copy=0.0, compute=1e9)  # so that blocks go to host memory
    core.kv.keep_on_host = core.swap.swap
    vocabulary = core.model.vocab_size
    random = np.random.default_rng(0)
    text = random.integers(0, vocabulary, 400).tolist()
    again = text[:12] * 6
    common = text[:261]
    waves = (
        (2, [text[i : i + 9] for i in range(8)]),
        (31, [random.integers(0, vocabulary, 100).tolist() for _ in range(6)]),
        (12, [common, [*common, 7], [*common, 9, 8], text[300:340], again]),
        (12, [[*common, 5], common, *([*common[:-3], i] for i in range(4)), text[100:160]]),
        (12, [common]),
        (12, [text[340:380]]),
    )
    """Tokens that each may say, and prompts. The first wave lets the second expect short answers."""
    late = [text[200:300], [*text[200:300], 5]]
    """Prompts that come while the last wave is answered."""
    execute = core.execute

    def noting(batch):
        outcome = execute(batch)
        c = core.columns
        for row, position, logits in zip(outcome.rows, outcome.positions, outcome.logits):
            key = int(c.number[row]), int(c.sample[row]), int(position)
            told.logits.setdefault(key, logits.float().cpu().clone())
        return outcome

    core.execute = noting
    functions = core.executor.functions

    def counting(name, words):
        if name == "sample":
            return functions(name, words)
        told.kinds[words] += 1
        return watch(core, words, functions(name, words)) if watch else functions(name, words)

    core.executor.functions = counting

    def submit(prompts: list[list[int]], most: int) -> None:
        for prompt in prompts:
            request = Request(f"{len(told.tokens)}", list(prompt), SamplingParams(max_tokens=most))
            told.tokens[core.submit(request), 0] = []

    for number, (most, prompts) in enumerate(waves, 1):
        submit(prompts, most)
        steps = 0
        while core.busy:
            for event in core.step():
                told.tokens[int(event.request_id), 0].append(event.token)
            steps += 1
            if number == len(waves) and steps == 1:
                submit(late, most)
    stats = core.stats()
    told.preempted, told.reused = stats.preemptions, stats.reused
    told.source = core.compiler.model(("decode", "prefill")).program.source
    return told


def worst(one: Transcript, other: Transcript) -> tuple[float, float, int]:
    """Largest and mean distance of logits, as far as both chose the same tokens; how many they compare."""
    distances = []
    for number, sample, position in one.logits:
        key = number, sample, position
        if key not in other.logits:
            continue
        ours, theirs = one.tokens[number, sample], other.tokens[number, sample]
        at = position - (max(p for n, s, p in one.logits if (n, s) == (number, sample)) - len(ours) + 1)
        if ours[:at] == theirs[:at]:
            distances.append((one.logits[key] - other.logits[key]).abs())
    every = torch.stack(distances)
    return float(every.max()), float(every.mean()), len(distances)
