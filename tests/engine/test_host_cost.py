"""What the engine itself costs beside the model: counted calls of steps on a device that computes nothing."""

import pytest

from sagellm.bench.host import calls, decoding

STEPS = 40
"""Some at which blocks fill and others are taken."""


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1}], ids=str)
def test_a_steady_step_costs_as_many_calls_for_1024_sequences_as_for_256(how):
    """Scheduling, deciding, lowering, lookup, binding, the null model's calls, commit, reporting."""
    few, many = (
        [calls(core.advance) for _ in range(STEPS)]
        for core in (decoding(256, 256, **how), decoding(1024, 256, **how))
    )
    assert sum(many) <= sum(few) * 1.05
    assert max(few) <= 1000 and max(many) <= 1000


def test_a_steady_step_finds_its_plan():
    core = decoding(256, 208)
    counts, before = core.compiler.counts, core.compiler.counts.hits
    while core.busy:
        core.advance()
    hits = counts.hits - before
    assert hits >= 150 and counts.misses <= 4
    assert core.stats().plan_hits == counts.hits
