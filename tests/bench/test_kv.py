"""A replay counts what the cache does, and nothing is above the optimum."""

from functools import lru_cache
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from sagellm.bench.conversations import TENANTS, conversations, write_trace
from sagellm.bench.kv import BELADY, EVERY, Asked, Replay, prompts
from sagellm.bench.workload import read_trace
from sagellm.cli import capture


def fewest_misses(requests: list[list[int]], blocks: int) -> int:
    """Over all ways to drop blocks: what a block costs is found by trying."""

    @lru_cache(None)
    def best(at: int, cached: frozenset) -> int:
        if at == len(requests):
            return 0
        wanted = frozenset(requests[at])
        others = sorted(cached - wanted)
        room = blocks - len(wanted)
        options = {frozenset(others)} if len(others) <= room else subsets(others, room)
        return len(wanted - cached) + min(best(at + 1, wanted | kept) for kept in options)

    return best(0, frozenset())


def subsets(items: list[int], count: int) -> set[frozenset]:

    return {frozenset(chosen) for chosen in combinations(items, count)}


CHAINS = [[1], [1, 2], [1, 2, 3], [1, 4], [5], [5, 6], [7, 8]]


@examples(40)
@given(st.lists(st.sampled_from(CHAINS), min_size=1, max_size=9), st.integers(3, 4))
def test_belady_is_the_optimum_and_every_policy_is_below_it(requests, blocks):
    asked = [Asked(np.array(ids, np.int32)) for ids in requests]
    best = Replay(BELADY, blocks, asked).run()
    assert best.asked - best.hits == fewest_misses(requests, blocks)
    for name in EVERY:
        assert Replay(name, blocks, asked).run().hits <= best.hits


def test_with_room_for_all_every_policy_finds_what_was_seen():
    rows = conversations(60, seed=1)
    asked = prompts(rows)
    seen = len({identity for row in rows for identity in row.hash_ids})
    for name in EVERY:
        found = Replay(name, seen, asked).run()
        assert found.hits == found.asked - seen and found.evicted == 0


def test_lifetime_gains_on_conversations():
    asked = prompts(conversations(700, seed=3))
    lru, life, best = (Replay(name, 200, asked).run().ratio for name in ("lru", "lifetime", BELADY))
    assert lru + 0.3 * (best - lru) < life < best


def test_lifetime_gains_by_knowing_whose_blocks_they_are():
    asked = prompts(conversations(1500, seed=1, tenants=TENANTS))
    unknown = [Asked(one.ids) for one in asked]
    known, blind = (Replay("lifetime", 300, one).run().ratio for one in (asked, unknown))
    assert known > blind


def test_a_made_trace_is_the_same_each_time_and_can_be_read_back(tmp_path):
    rows = conversations(50, seed=4)
    assert rows == conversations(50, seed=4) != conversations(50, seed=5)
    rows = conversations(50, seed=4, tenants=TENANTS)
    assert {row.tenant for row in rows} == {who.name for who in TENANTS}
    write_trace(rows, tmp_path / "trace.jsonl")
    assert read_trace(tmp_path / "trace.jsonl") == rows
    assert all(a.timestamp <= b.timestamp for a, b in pairwise(rows))


def test_the_command_prints_policies_beside_the_optimum():
    run = capture(
        ["bench", "kv", "--requests", "40", "--blocks", "150", "--policy", "lru", "--policy", "slru"]
    )
    assert run.code == 0 and run.stdout.split()[:5] == ["blocks", "policy", "hit_ratio", "belady", "gain"]
    assert [line.split()[1] for line in run.stdout.splitlines()[1:]] == ["lru", "slru"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--policy", "fifo"], "unknown policy 'fifo'"),
        (["--blocks", "3", "--policy", "lru"], "3 blocks; accepted: at least"),
    ],
)
def test_bad_input_is_one_line(arguments, said):
    run = capture(["bench", "kv", "--requests", "20", *arguments])
    assert run.code == 2 and said in run.stderr and run.stderr.count("\n") == 1
