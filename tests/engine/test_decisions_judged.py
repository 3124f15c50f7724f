"""A decision that is measured to lose is switched off while the engine serves, and says so."""

import logging

import pytest
from checkpoints import make_core, random_tokens, serve, tokens_of

from sagellm.backends.cpu import CpuBackend
from sagellm.batch import SamplingParams
from sagellm.runtime import trials
from sagellm.runtime.executor import Executor
from sagellm.target import CostModel

pytest_plugins = ["checkpoints"]

PIPELINE = "prefix-dedup,cleanup,kernel-fusion,pack-weights"


@pytest.mark.parametrize("slower", ["cascade", "alone"])
def test_reading_together_is_judged_by_the_clock(checkpoint, monkeypatch, caplog, slower):
    """Steps of the slower kind take ten times as long by the executor's clock."""
    monkeypatch.setattr(CpuBackend, "costs", CostModel(call=0.0, narrow=1.0))
    monkeypatch.setattr(trials, "EVERY", 3)
    run = Executor.run

    def timed(executor, plan, batch):
        outcome = run(executor, plan, batch)
        together = any(call.op == "batch.cascade" for call in plan.calls)
        executor.device_seconds = 10.0 if together == (slower == "cascade") else 1.0
        return outcome

    monkeypatch.setattr(Executor, "run", timed)
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
        assert not trial.off and gains["prefix-dedup cascade 8"] == 9.0 and not caplog.text
    monkeypatch.setattr(Executor, "run", run)
    plain = make_core(folder, "cleanup,kernel-fusion,pack-weights", max_length=250)
    assert made == tokens_of(serve(plain, prompts, SamplingParams(max_tokens=150, ignore_eos=True)))
