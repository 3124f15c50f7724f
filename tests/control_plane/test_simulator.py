"""A trace over simulated engines: nothing is lost, and what was sent to the same engine again is found there."""

import json

import numpy as np
import pytest

from sagellm.bench.conversations import conversations, write_trace
from sagellm.bench.workload import TraceRow
from sagellm.cli import capture
from sagellm.control_plane.routing.strategies import STRATEGIES
from sagellm.control_plane.simulator import COST, simulate


def talks(count: int, turns: int, seed: int = 0) -> list[TraceRow]:
    """Conversations that share nothing with each other, their turns mixed; a second between two requests."""
    random = np.random.default_rng(seed)
    order = random.permutation(np.repeat(np.arange(count), turns)).tolist()
    said: dict[int, int] = {}
    rows = []
    for at, talk in enumerate(order):
        said[talk] = said.get(talk, 3) + 1
        ids = tuple(1000 * talk + number for number in range(said[talk]))
        rows.append(TraceRow(1000.0 * at, 512 * len(ids), 40, ids))
    return rows


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_request_ends_and_no_token_is_found_that_was_not_there(strategy):
    rows = conversations(80, seed=2)
    found = simulate(rows, strategy, engines=3, blocks=160)
    assert len(found.served) == len(rows)
    for request, row in zip(found.served, rows):
        assert request.sent < request.first <= request.finished
        assert request.left == 0 and 0 <= request.cached < row.input_length
        assert (request.finished == request.first) == (row.output_length == 1)
    unlimited = simulate(rows, strategy, engines=1, blocks=4000)
    assert 0 < found.cached <= unlimited.cached
    assert found.imbalance >= 1


def test_the_same_seed_gives_the_same_figures():
    rows = conversations(80, seed=3)
    one, two = (simulate(rows, "composite", engines=4, blocks=300, seed=5).summary() for _ in range(2))
    assert one == two


def test_where_a_conversation_goes_on_decides_what_is_found():
    """Four engines: at random a turn meets its conversation in one of four."""
    rows = talks(count=12, turns=8)
    cached = {
        name: simulate(rows, name, engines=4, blocks=400).cached
        for name in ("round_robin", "prefix_affinity", "composite")
    }
    assert cached["prefix_affinity"] > 1.5 * cached["round_robin"]
    assert cached["composite"] > 1.5 * cached["round_robin"]


def test_one_request_takes_what_the_cost_model_says():
    found = simulate([TraceRow(0.0, 4 * 512, 11, (1, 2, 3, 4))], "round_robin", engines=1, blocks=10)
    (request,) = found.served
    assert request.first == pytest.approx(float(COST.seconds(2048)))
    assert request.finished - request.first == pytest.approx(10 * float(COST.seconds(1)))


def test_engines_without_room_let_requests_wait():
    rows = [TraceRow(float(at), 8 * 512, 50, tuple(range(10 * at, 10 * at + 8))) for at in range(6)]
    crowded, roomy = (simulate(rows, "round_robin", engines=1, blocks=blocks) for blocks in (9, 60))
    last = [max(request.first for request in found.served) for found in (crowded, roomy)]
    assert last[0] > 2 * last[1]


def test_the_commands_print_a_line_for_each_strategy(tmp_path):
    write_trace(conversations(40, seed=1), tmp_path / "trace.jsonl")
    arguments = ["--trace", str(tmp_path / "trace.jsonl"), "--strategy", "slo", "--strategy", "composite"]
    run = capture(["bench", "fleet", *arguments, "--blocks", "200", "--blocks", "300", "--json"])
    assert run.code == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [(line["blocks"], line["strategy"]) for line in lines] == [
        (200, "slo"), (200, "composite"), (300, "slo"), (300, "composite"),
    ]  # fmt: skip
    run = capture(["bench", "route", "--engines", "4", "--requests", "60", "--strategy", "slo"])
    assert run.code == 0 and run.stdout.splitlines()[1].split()[:2] == ["slo", "4"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["fleet", "--strategy", "best"], "unknown strategy 'best'; accepted: composite"),
        (["route", "--strategy", "best"], "unknown strategy 'best'; accepted: composite"),
        (["fleet", "--requests", "20", "--blocks", "3"], "3 blocks; accepted: at least"),
    ],
)
def test_bad_input_is_one_line(arguments, said):
    run = capture(["bench", *arguments])
    assert run.code == 2 and said in run.stderr and run.stderr.count("\n") == 1
