"""A decision that is measured to lose is switched off while the engine serves, and says so."""

import logging

import pytest
from checkpoints import make_core, random_tokens, serve, tokens_of

from sagellm.backends.cpu import CpuBackend
from sagellm.batch import SamplingParams
from sagellm.engine.core import EngineCore
from sagellm.runtime import trials
from sagellm.target import CostModel

pytest_plugins = ["checkpoints"]

PIPELINE = "prefix-dedup,cleanup,kernel-fusion,pack-weights"


@pytest.mark.parametrize("slower", ["cascade", "alone"])
def test_reading_together_is_judged_by_the_clock(checkpoint, monkeypatch, caplog, slower):
    """Steps of the slower kind take ten times as long by the core's clock."""
    monkeypatch.setattr(CpuBackend, "costs", CostModel(call=0.0, narrow=1.0))
    monkeypatch.setattr(trials, "EVERY", 3)
    judge = EngineCore._judge

    def by_the_clock(core, tried, results, _):
        ((batch, _),) = results
        together = ("cascade",) in batch.facts.values()
        judge(core, tried, results, 10.0 if together == (slower == "cascade") else 1.0)

    monkeypatch.setattr(EngineCore, "_judge", by_the_clock)
    folder = checkpoint("Qwen3ForCausalLM")
    core = make_core(folder, PIPELINE, max_length=250)
    common = random_tokens(64, 1)
    prompts = [common + random_tokens(3 + i, i) for i in range(6)]
    with caplog.at_level(logging.WARNING):
        made = tokens_of(serve(core, prompts, SamplingParams(max_tokens=150, ignore_eos=True)))
    gains = core.stats().gains
    assert list(gains) == ["prefix-dedup cascade 8"]
    trial = core.trials.of(("prefix-dedup", "cascade", 8))
    if slower == "cascade":
        assert trial.off and gains["prefix-dedup cascade 8"] == -9.0
        assert "prefix-dedup: declined at steps of up to 8 rows: cascade made them slower" in caplog.text
    else:
        assert not trial.off and gains["prefix-dedup cascade 8"] == 9.0
        assert not [record for record in caplog.records if record.name.startswith("sagellm")]
    plain = make_core(folder, "cleanup,kernel-fusion,pack-weights", max_length=250)
    assert made == tokens_of(serve(plain, prompts, SamplingParams(max_tokens=150, ignore_eos=True)))


@pytest.mark.parametrize("verify", [1.5, 40.0])
def test_guesses_are_judged_by_the_seconds_that_a_token_takes(checkpoint, monkeypatch, caplog, verify):
    """A plain step takes a second by the core's clock, one that verifies guesses so many. Texts come again."""
    judge, seen = EngineCore._judge, []

    def by_the_clock(core, tried, results, _):
        ((batch, outcome),) = results
        guessed = outcome.trees is not None
        seen.append((guessed, len(outcome.rows) / len(batch.decode)))
        judge(core, tried, results, verify if guessed else 1.0)

    monkeypatch.setattr(EngineCore, "_judge", by_the_clock)
    folder, name = checkpoint("LlamaForCausalLM"), "speculative-branching drafted 1"
    pipeline = f"{PIPELINE},speculative-branching{{gain=0.0}}"
    prompts, how = [random_tokens(9, seed) for seed in range(2)], SamplingParams(max_tokens=100)
    core = make_core(folder, pipeline, max_length=128, max_sequences=1)
    serve(core, prompts, how)
    monkeypatch.setattr(trials, "EVERY", 2)
    core.trials = trials.Trials()
    seen.clear()
    with caplog.at_level(logging.WARNING):
        made = tokens_of(serve(core, prompts * 2, how))
    trial = core.trials.of(("speculative-branching", "drafted", 1))
    each = [tokens for guessed, tokens in seen if guessed]
    assert all(tokens == 1 for guessed, tokens in seen if not guessed)
    assert sum(not guessed for guessed, _ in seen) >= trials.WINDOW
    assert 1.5 < sum(each) / len(each) < 13
    gain = core.stats().gains[name]
    if verify > 13:
        assert trial.off and gain < 0 and "drafted made them slower (measured: " in caplog.text
    else:
        assert not trial.off and 0 < gain < 1 and "made them slower" not in caplog.text
    assert made == tokens_of(serve(make_core(folder, PIPELINE, max_length=128), prompts * 2, how))
