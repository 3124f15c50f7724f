"""Speculation changes no output: m guessed tokens are m plain steps, in meaning and in the engine."""

import os
import random

import numpy as np
import pytest
import torch
from checkpoints import make_core, random_tokens, serve, tokens_of
from hypothesis import given
from hypothesis import strategies as st
from strategies import every_kernel, examples, model_configs, samplings, small_model, speculations

from sagellm.backends.cpu import CpuBackend
from sagellm.batch import Batch, Columns, Phase, Request, SamplingParams
from sagellm.drafts import Drafts
from sagellm.engine.engine import SageLLMEngine
from sagellm.engine.planner import Planner
from sagellm.engine.record import replay
from sagellm.ir.lower import lower, step_graph
from sagellm.meaning.check import MeaningChanged, check_batch_passes
from sagellm.models.decoder import build_model
from sagellm.passes import DEFAULT
from sagellm.passes.driver import Pipeline, StepView
from sagellm.passes.speculative_branching import SpeculativeBranching
from sagellm.target import CostModel, StepCost
from sagellm.trees import Trees

pytest_plugins = ["checkpoints"]

PLAIN = DEFAULT.replace("speculative-branching,", "")
EAGER = DEFAULT.replace("speculative-branching", "speculative-branching{gain=0.0}")
"""Whatever may be guessed is."""
PROMPTS = int(os.environ.get("SAGELLM_EXAMPLES", "24"))


# meaning


@examples(40)
@given(model_configs(), speculations())
def test_guessed_tokens_equal_plain_steps(config, batch):
    step = step_graph(lower(batch, config.vocab_size))
    model = build_model(config, "float32", ("decode",))
    check_batch_passes(step, Pipeline([SpeculativeBranching()]), every_kernel(), batch, model)


def test_a_guess_that_is_kept_though_it_is_wrong_is_caught(monkeypatch):
    from sagellm.ir.reference import MEANINGS
    from sagellm.ir.reference.spec import Accepted

    columns = Columns(1, 32, 4)
    columns.fill(0, Request("", [1, 2, 3], SamplingParams()))
    columns.context[0], columns.new[0], columns.drafted[0] = 2, 1, 1
    batch = Batch(columns, np.array([0]), np.zeros(0, np.int64))
    batch.facts[Phase.DECODE] = ("drafted",)
    model = build_model(small_model(), "float32", ("decode",))
    check = (step_graph(lower(batch, 7)), Pipeline([SpeculativeBranching()]), every_kernel(), batch, model)
    monkeypatch.setitem(
        MEANINGS, "spec.verify", lambda scope, op, tokens, members: [Accepted(0, tuple(tokens.tolist()), 1)]
    )
    caught = 0
    for guess in range(7):
        columns.draft_tokens[0, 0] = guess
        try:
            check_batch_passes(*check)
        except MeaningChanged as error:
            assert "pass speculative-branching changed the" in str(error)
            caught += 1
    assert caught == 6  # one guess was right


# the engine


@pytest.fixture(scope="module", autouse=True)
def guesses_are_not_left_out():
    """As they are now and then, to measure what they gain, and for good where that is nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sagellm.runtime.trials.EVERY", 1 << 60)
        yield


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("LlamaForCausalLM")


@pytest.fixture(scope="module")
def cores(folder):
    """Without guesses, and with all that can be had."""
    return [make_core(folder, pipeline, block_size=4, max_length=200) for pipeline in (PLAIN, EAGER)]


def repetitive(seed: int) -> list[int]:
    """A text whose parts come again."""
    rng = np.random.default_rng(seed)
    parts = [rng.integers(0, 12, int(rng.integers(2, 9))).tolist() for _ in range(3)]
    return [token for at in rng.integers(0, 3, 6) for token in parts[at]]


def test_greedy_outputs_are_the_same(cores):
    """Looped outputs, prompts that repeat themselves, prompts that come again."""
    for first in range(0, PROMPTS, 8):
        prompts = [
            repetitive(seed) if seed % 3 else random_tokens(9, seed % 11) for seed in range(first, first + 8)
        ]
        how = SamplingParams(max_tokens=40)
        plain, guessing, again = (tokens_of(serve(core, prompts, how)) for core in (*cores, cores[1]))
        assert plain == guessing == again
    stats = cores[1].stats()
    assert stats.accepted > 0 and stats.drafted > stats.accepted and stats.verify_steps > 0
    assert stats.steps < 1.7 * cores[0].stats().steps and cores[0].stats().drafted == 0
    assert stats.remarks["speculative-branching"]["applied"] == stats.verify_steps


@pytest.mark.skipif(
    CpuBackend().capability.linear_layouts.get("bfloat16") != "panels",
    reason="products whose rounding depends on the rows beside",
)
def test_bfloat16_outputs_are_the_same_bit_for_bit(folder):
    """Where a product's row does not depend on the rows beside it, nor does any logit on what was guessed."""
    cores = [make_core(folder, p, block_size=4, max_length=200, dtype="bfloat16") for p in (PLAIN, EAGER)]
    for first in range(0, PROMPTS, 8):
        prompts = [repetitive(seed) for seed in range(first, first + 8)]
        how = SamplingParams(max_tokens=40, logprobs=3)
        plain, guessing, again = (serve(core, prompts, how) for core in (*cores, cores[1]))
        told = [
            [[(e.token, e.logprob, e.top) for e in one] for one in run] for run in (plain, guessing, again)
        ]
        assert told[0] == told[1] == told[2]
    assert cores[1].stats().accepted > 50


@examples(12)
@given(st.lists(st.tuples(samplings, st.integers(0, 99)), min_size=1, max_size=6), st.data())
def test_sampled_outputs_are_the_same(cores, asked, data):
    """Penalties and forbidden ends see the guesses before them; end tokens and limits stand in the middle of a path."""
    prompts, hows = [], []
    for how, seed in asked:
        limit = data.draw(st.integers(1, 30))
        prompts.append(repetitive(seed))
        hows.append(
            SamplingParams(
                **{
                    name: getattr(how, name)
                    for name in ("temperature", "top_k", "top_p", "repetition_penalty")
                },
                presence_penalty=how.presence_penalty,
                max_tokens=limit,
                min_tokens=data.draw(st.integers(0, limit)),
                stop_token_ids=tuple(range(0, 300, 7)),
                logit_bias={3: 2.0},
                logprobs=1,
                n=data.draw(st.integers(1, 2)),
                seed=seed,
            )
        )
    told = []
    for core in cores:
        told.append([sorted(one, key=lambda e: (e.sample, e.index)) for one in serve(core, prompts, *hows)])
    for plain, guessing in zip(*told):
        for one, other in zip(plain, guessing, strict=True):
            assert (one.token, one.sample, one.index, one.finish_reason) == (
                other.token, other.sample, other.index, other.finish_reason,
            )  # fmt: skip
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


def test_outputs_are_the_same_where_the_cache_is_too_small_for_all(folder, monkeypatch):
    """Sequences are put back; guesses take no block that a sequence needs."""
    monkeypatch.setattr(Planner, "_block_count", lambda planner: 31)
    prompts = [repetitive(seed % 7) for seed in range(14)]
    outputs = []
    for core in [make_core(folder, p, block_size=4, max_length=100) for p in (PLAIN, EAGER)]:
        draw = random.Random(1)
        for name, prompt in enumerate(prompts):
            core.submit(Request(str(name), prompt, SamplingParams(max_tokens=30)))
        told = {str(name): [] for name in range(len(prompts))}
        while core.busy:
            for event in core.step():
                told[event.request_id].append(event.token)
            if draw.random() < 0.1 and core.scheduler.running > 1:
                core.scheduler.preempt(draw.choice(core.scheduler._running[1:].tolist()))
        outputs.append(told)
    assert outputs[0] == outputs[1]
    stats = core.stats()
    assert stats.accepted > 20 and stats.preemptions > 5
    assert stats.kv_blocks_used == 0


def test_outputs_are_the_same_with_a_window(checkpoint):
    folder = checkpoint("MistralForCausalLM", sliding_window=6)
    prompts = [repetitive(seed) for seed in range(6)]
    cores = [make_core(folder, p, block_size=4, max_length=100) for p in (PLAIN, EAGER)]
    how = SamplingParams(max_tokens=30)
    plain, guessing, again = (tokens_of(serve(core, prompts, how)) for core in (*cores, cores[1]))
    assert plain == guessing == again and cores[1].stats().accepted > 50


def test_stop_strings_end_a_text_in_the_middle_of_what_was_accepted():
    told = []
    for pipeline in (PLAIN, EAGER):
        with SageLLMEngine("builtin", dtype="float32", pipeline=pipeline, max_length=256) as engine:
            (free,) = engine.generate(["Once upon a time"], SamplingParams(max_tokens=40))
            hows = [SamplingParams(max_tokens=40, stop=free.text[at : at + 3]) for at in (9, 16, 25)]
            told.append([engine.generate(["Once upon a time"], how)[0] for how in hows])
            stats = engine.stats()
    assert stats.accepted > 5
    for one, other in zip(*told):
        assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, "stop")


def test_sampled_tokens_come_as_often_as_they_should(folder):
    """Chi-square of the second and third token over many seeds, where guesses were accepted and where not."""
    prompt, count = [1, 2, 3, 4], 400
    counts = []
    for pipeline, first in ((PLAIN, 0), (EAGER, 10**6)):
        core = make_core(folder, pipeline, max_sequences=32, max_queue=4096)
        hows = [SamplingParams(temperature=0.6, top_k=4, max_tokens=3, seed=first + i) for i in range(count)]
        outputs = tokens_of(serve(core, [prompt] * count, *hows))
        counts.append([tuple(output[1:]) for output in outputs])
    assert core.stats().accepted > 20
    seen = sorted(set(counts[0]) | set(counts[1]), key=lambda pair: -(counts[0] + counts[1]).count(pair))
    table = np.array([[some.count(pair) for pair in seen] for some in counts])
    often = table.sum(0) >= 10
    table = np.column_stack([table[:, often], table[:, ~often].sum(1)])
    table = table[:, table.sum(0) > 0]
    assert table.shape[1] > 3
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    square = ((table - expected) ** 2 / expected).sum()
    freedom = torch.tensor(table.shape[1] - 1.0)
    assert torch.special.gammaincc(freedom / 2, torch.tensor(square / 2)) > 0.001


# whether it pays

COST = StepCost(token=1.0, least=8.0, start=1.0, verify=0.0)


def decode(rows: int, tokens: list[int]) -> tuple[Batch, StepView]:
    columns = Columns(rows, 64, 8)
    for row in range(rows):
        columns.fill(row, Request(str(row), tokens), number=row + 1)
        columns.context[row], columns.new[row] = len(tokens) - 1, 1
    batch = Batch(columns, np.arange(rows), np.zeros(0, np.int64))
    batch.spare = (1000, 1000)
    return batch, StepView(CostModel(), step=COST, drafts=Drafts(columns))


def test_guesses_are_as_many_as_cost_nothing():
    batch, view = decode(1, [5, 6] * 8)
    SpeculativeBranching().decide(batch, view)
    assert 1 < batch.columns.drafted[0] <= 12
    assert batch.facts[Phase.DECODE] == ("drafted",)
    assert "tokens are guessed for 1 of 1 sequences" in batch.notes["speculative-branching"]


def test_where_the_batch_fills_the_device_nothing_is_guessed():
    batch, view = decode(64, [5, 6] * 8)
    SpeculativeBranching().decide(batch, view)
    assert not batch.columns.drafted.any() and not batch.facts


@pytest.mark.parametrize("spare", [(0, 100), (100, 0), (3, 100), (100, 3)])
def test_guesses_keep_to_the_room_that_is_left(spare):
    batch, view = decode(1, [5, 6] * 8)
    batch.spare = spare
    SpeculativeBranching().decide(batch, view)
    assert batch.columns.drafted[0] <= min(spare)


def test_guesses_that_do_not_hold_are_tried_rarely():
    batch, view = decode(1, [5, 6] * 8)
    c, speculated = batch.columns, []
    for _ in range(1000):
        batch.facts = {}
        SpeculativeBranching().decide(batch, view)
        speculated.append(bool(batch.facts))
        if batch.facts:
            view.drafts.learn(Trees.of(c, batch.decode), np.array([0]))
    assert sum(speculated[200:]) <= 0.02 * 800
    assert sum(speculated[200:]) > 0


def test_sequences_with_guesses_stand_last():
    batch, view = decode(3, [5, 6] * 8)
    batch.columns.tokens[1, :16] = np.arange(16)
    SpeculativeBranching().decide(batch, view)
    drafted = batch.columns.drafted[batch.decode]
    assert drafted[0] == 0 and (drafted[1:] > 0).all() and batch.decode[0] == 1


def test_a_step_that_verified_guesses_runs_again_from_disk(folder, tmp_path):
    core = make_core(folder, EAGER, block_size=4, max_length=100, record=tmp_path)
    for _ in range(2):
        serve(core, [repetitive(1), repetitive(2)], SamplingParams(max_tokens=20))
    verified = [path for path in sorted(tmp_path.glob("*.mlir")) if "spec.verify" in path.read_text()]
    several = 0
    for path in verified[-6:]:
        again = replay(path)
        assert again.recorded_tokens.tolist() == again.outcome.tokens.tolist()
        assert again.difference < 1e-4
        several += len(again.outcome.tokens) > 2
    assert several


def test_checks_while_serving_find_speculating_steps_equal(folder):
    core = make_core(folder, EAGER, max_length=100, check_passes=1)
    for _ in range(2):
        serve(core, [repetitive(1)[:9]], SamplingParams(max_tokens=12))
    stats = core.stats()
    assert stats.accepted > 0 and stats.checked == {"equal": stats.steps}
