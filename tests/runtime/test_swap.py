"""Blocks go to host memory where a copy there and back takes less than computing them again."""

from sagellm.runtime.swap import SwapOrRecompute


def test_the_prediction_holds_until_both_were_measured():
    assert SwapOrRecompute(copy=1.0, compute=2.1).swap
    assert not SwapOrRecompute(copy=1.0, compute=2.0).swap


def test_what_is_measured_replaces_what_was_predicted():
    ways = SwapOrRecompute(copy=1.0, compute=100.0)
    for _ in range(100):
        ways.computed(blocks=4, seconds=4.0)
    assert not ways.swap
    ways.copied(1, 1000.0)
    for _ in range(100):
        ways.copied(10, 1.0)
    assert ways.swap, "the first copy counts for nothing"
