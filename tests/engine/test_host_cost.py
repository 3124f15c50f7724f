"""What the engine itself costs beside the model: counted calls of steps on a device that computes nothing."""

import sys

import pytest

from sagellm.batch import Request, SamplingParams
from sagellm.config import EngineConfig
from sagellm.engine.core import EngineCore

STEPS = 40
"""Some at which blocks fill and others are taken."""


def calls(function):
    """Calls of Python and of C functions."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def steady(rows, **how):
    """Cores with so many sequences that decode."""
    core = EngineCore(
        EngineConfig(
            model="builtin", target="null", max_sequences=rows, max_batched_tokens=8192, max_length=256
        )
    )
    sampling = SamplingParams(max_tokens=200, ignore_eos=True, **how)
    for index in range(rows):
        core.submit(Request(str(index), [5 + index % 90, 7 + index // 90, 9][: 1 + index % 3], sampling))
    for _ in range(3):
        core.advance()
    return core


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1}], ids=str)
def test_a_steady_step_costs_as_many_calls_for_1024_sequences_as_for_256(how):
    """Scheduling, deciding, lowering, lookup, binding, the null model's calls, commit, reporting."""
    few, many = (
        [calls(core.advance) for _ in range(STEPS)] for core in (steady(256, **how), steady(1024, **how))
    )
    assert sum(many) <= sum(few) * 1.05
    assert max(few) <= 1000 and max(many) <= 1000


def test_a_steady_step_finds_its_plan():
    core = steady(256)
    counts, before = core.compiler.counts, core.compiler.counts.hits
    while core.busy:
        core.advance()
    hits = counts.hits - before
    assert hits >= 150 and counts.misses <= 4
    assert core.stats().plan_hits == counts.hits
