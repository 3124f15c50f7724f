"""What a benchmark asks of an engine: lengths and times as wanted, what a trace shares stays shared."""

import json

import numpy as np
import pytest

from sagellm.bench.workload import read_trace, replayed, uniform
from sagellm.errors import UserError


def entry(at, length, output, ids):
    return {"timestamp": at, "input_length": length, "output_length": output, "hash_ids": ids}


@pytest.fixture
def trace(tmp_path):
    entries = [
        entry(0, 1100, 200, [0, 1, 2]),
        entry(1000, 1536, 10, [0, 1, 3]),
        entry(4000, 512 * 20, 1000, list(range(10, 30))),
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    return path


def test_arrivals_come_at_the_rate_and_with_the_lengths_that_were_asked_for():
    some = uniform(2000, 50.0, (3, 9), (1, 4), vocabulary=100, seed=1)
    assert some[0].at == 0.0 and sorted(a.at for a in some) == [a.at for a in some]
    assert 2000 / some[-1].at == pytest.approx(50, rel=0.1)
    assert {len(a.prompt) for a in some} == set(range(3, 10)) and {a.output for a in some} == {1, 2, 3, 4}
    assert all(10 <= t < 100 for a in some for t in a.prompt)
    assert some == uniform(2000, 50.0, (3, 9), (1, 4), vocabulary=100, seed=1)
    assert {a.at for a in uniform(5, 0, (1, 1), (1, 1), 100, 1)} == {0.0}


def test_a_replayed_trace_keeps_its_shape(trace):
    first, second, long = replayed(read_trace(trace), 2.0, block=16, longest=128, vocabulary=1000, seed=0)
    assert (first.at, second.at, long.at) == (0.0, 0.25, 1.0), "two requests a second"
    assert (len(first.prompt), len(second.prompt)) == (34, 48), "1/32 of the trace's tokens"
    assert first.prompt[:32] == second.prompt[:32], "two equal blocks"
    assert not np.array_equal(first.prompt[32:], second.prompt[32:34])
    assert (len(long.prompt), long.output) == (128 - 31, 31), "cut to what the engine takes"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no request; accepted: JSON lines"),
        ("{}\n", "line 1 of .* is no request .*; accepted: an object with timestamp"),
        (json.dumps(entry(0, 1, 1, [0])) + "\n[]\n", "line 2 of"),
        (json.dumps(entry(0, 0, 1, [])), "line 1 of .* has no tokens"),
    ],
)
def test_a_file_that_is_no_trace_is_one_line(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_trace(path)
    with pytest.raises(UserError, match="cannot read a trace"):
        read_trace(tmp_path / "nothing")
