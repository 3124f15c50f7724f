"""A decision that is measured to lose is switched off; one that gains is asked ever more rarely."""

import random

import pytest

from sagellm.runtime.trials import AGAIN, EVERY, LOSS, WINDOW, Trials


def steps(trial, count, with_it, without, noise=0.0, seed=0):
    """Runs so many steps; how many were without, and when it was switched off."""
    draw, left_out, switched = random.Random(seed), 0, None
    for step in range(count):
        out = trial.leave_out()
        left_out += out
        seconds = (without if out else with_it) * (1 + noise * draw.random())
        if trial.took(seconds):
            switched = step
    return left_out, switched


def test_a_decision_that_loses_is_switched_off_after_enough_comparisons():
    trial = Trials().of("x")
    left_out, switched = steps(trial, 20 * EVERY, with_it=1.1, without=1.0)
    assert trial.off and switched is not None and switched < (WINDOW + 1) * (EVERY + 3)
    assert trial.gain is not None and abs(trial.gain + 0.1) < 1e-9
    assert left_out == WINDOW + 20 * EVERY - switched - 1, "from then on all steps run without it"


def test_a_decision_that_gains_stays_and_costs_ever_less():
    trial = Trials().of("x")
    first, _ = steps(trial, 20 * EVERY, with_it=1.0, without=1.5)
    later, _ = steps(trial, 20 * EVERY, with_it=1.0, without=1.5)
    assert not trial.off and 0 <= later < first <= 20 and abs(trial.gain - 0.5) < 1e-9


def test_noise_alone_switches_nothing_off():
    for seed in range(20):
        trial = Trials().of("x")
        assert steps(trial, 100 * EVERY, 1.0, 1.0 + LOSS, noise=0.05, seed=seed)[1] is None


def test_a_decision_that_was_switched_off_is_measured_anew_after_a_while():
    trial = Trials().of("x")
    steps(trial, 20 * EVERY, with_it=1.1, without=1.0)
    assert trial.off
    left_out, _ = steps(trial, AGAIN + 20 * EVERY, with_it=1.0, without=1.1)
    assert not trial.off and abs(trial.gain - 0.1) < 1e-9 and left_out < AGAIN + WINDOW


@pytest.mark.parametrize(("with_it", "pays"), [(1.5, True), (3.0, False)])
def test_steps_that_give_one_token_or_ten_are_judged_by_what_they_give_on_average(with_it, pays):
    """One in ten gives ten: 1.9 tokens a step. Most of them, alone, lose."""
    trial, draw = Trials().of("x", uneven=True), random.Random(0)
    for _ in range(20 * EVERY):
        out = trial.leave_out()
        trial.took(1.0 if out else with_it, 1 if out or draw.random() > 0.1 else 10)
    assert trial.off == (not pays) and abs(trial.gain - (1 - with_it / 1.9)) < 0.15


def test_kinds_of_steps_are_judged_apart():
    trials = Trials()
    steps(trials.of("loses"), 20 * EVERY, 1.1, 1.0)
    steps(trials.of("gains"), 20 * EVERY, 1.0, 1.1)
    assert trials.of("loses").off and not trials.of("gains").off
    assert set(trials.gains()) == {"loses", "gains"}
