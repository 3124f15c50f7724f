"""What an engine says of itself: counted from the plans that were executed, and as Prometheus reads it."""

import pytest
from attrs import fields
from checkpoints import random_tokens
from prometheus_client.parser import text_string_to_metric_families

from sagellm.batch import SamplingParams
from sagellm.engine import metrics
from sagellm.engine.engine import SageLLMEngine
from sagellm.engine.stats import EngineStats, Times

pytest_plugins = ["checkpoints"]


@pytest.fixture(scope="module")
def engine(text_checkpoint):
    with SageLLMEngine(str(text_checkpoint), max_sequences=4, engine_id="one") as engine:
        prompt = random_tokens(40, 1)
        how = SamplingParams(max_tokens=6, ignore_eos=True)
        for _ in range(2):
            engine.generate([prompt, prompt[:20], random_tokens(9, 2)], how)
        yield engine


@pytest.fixture(scope="module")
def samples(engine):
    families = list(text_string_to_metric_families(engine.metrics()))
    assert len({family.name for family in families}) == len(families)
    assert all(family.documentation for family in families)
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples, name, **labels):
    labels |= {"engine": "one", "model": next(dict(key[1:])["model"] for key in samples)}
    return samples[(f"sagellm_{name}", *sorted(labels.items()))]


def test_a_scraper_reads_what_the_snapshot_says(engine, samples):
    stats = engine.stats()
    for field, (name, _) in metrics.GAUGES.items():
        assert value(samples, name) == getattr(stats, field)
    for field, (name, _) in metrics.COUNTERS.items():
        assert value(samples, f"{name}_total") == getattr(stats, field)
    assert value(samples, "finished_sequences_total", reason="length") == 6
    assert value(samples, "pass_remarks_total", **{"pass": "prefix-dedup", "outcome": "applied"}) >= 1
    for field, (name, _) in metrics.TIMES.items():
        assert value(samples, f"{name}_count") == stats.times[field]["count"]
        assert value(samples, f"{name}_bucket", le="+Inf") == stats.times[field]["count"]


def test_the_counts_are_of_what_happened(engine):
    stats = engine.stats()
    assert (stats.prompt, stats.generated) == (2 * 69, 2 * 3 * 6)
    assert stats.reused == 32 + 16, "the second time, in whole blocks"
    assert stats.shared == 20, "the first time: the short prompt is how the long one begins"
    wrong = stats.drafted - stats.accepted
    assert stats.forwarded == stats.prompt - stats.shared - stats.reused + stats.generated - 6 + wrong
    counts = {name: stats.times[name]["count"] for name in Times.__slots__ if name[0] != "_"}
    assert counts == {
        "ttft": 6, "itl": 30, "tpot": 6, "queue": 6, "step": stats.steps, "host": stats.steps,
    }  # fmt: skip
    assert stats.plan_hits + stats.plan_misses == stats.steps
    assert 0 < stats.mean("host") < stats.mean("step")


def test_every_field_of_the_snapshot_is_a_metric():
    known = {*metrics.GAUGES, *metrics.COUNTERS, *metrics.LABELLED, metrics.GAINS[0], "remarks", "times"}
    assert {field.name for field in fields(EngineStats)} == known
