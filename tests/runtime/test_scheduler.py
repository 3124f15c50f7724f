"""Who runs when, who gives way, and what is refused; how many tokens a step takes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from world import LONGEST, NEVER, World, expected

from sagellm.errors import QueueFull, UserError
from sagellm.kv.prefix import HostTier
from sagellm.runtime.pool import BlockPool

tokens = st.integers(0, 2)
beginnings = st.sampled_from([[], [0] * 3, [0] * 8, [0] * 11, [0, 1] * 6])
prompts = st.builds(
    lambda a, b: (a + b)[: LONGEST - 1], beginnings, st.lists(tokens, min_size=1, max_size=20)
)


def running(world):
    return [world.scheduler.sequences[row].request.id for row in world.scheduler._running.tolist()]


@examples(100)
@given(texts=st.lists(prompts, min_size=1, max_size=5))
def test_a_step_forwards_each_distinct_beginning_once(texts):
    """As many tokens as the trie of the prompts has nodes."""
    world = World(capacity=5, blocks=30, budget=1000)
    for index, prompt in enumerate(texts):
        world.submit(str(index), prompt, max_tokens=1)
    world.step()
    assert world.forwarded == len({tuple(p[: n + 1]) for p in texts for n in range(len(p))})
    world.check_whole()


@examples(100)
@given(texts=st.lists(prompts, min_size=1, max_size=5), budget=st.integers(1, 30))
def test_so_do_steps_that_are_too_small_for_the_prompts(texts, budget):
    """In whatever chunks they come."""
    world = World(capacity=5, blocks=30, budget=budget, caching=False, end=NEVER)
    for index, prompt in enumerate(texts):
        world.submit(str(index), prompt, max_tokens=1)
    world.run_all()
    assert world.forwarded == len({tuple(p[: n + 1]) for p in texts for n in range(len(p))})
    world.check_whole()


@pytest.mark.parametrize("budget", range(7, 24))
def test_a_beginning_that_comes_in_chunks_is_held_once(budget):
    """A leader's chunks end with blocks, which its followers hold too: decodes can then read all of them together.
    The budget has room for a block and for a token of each follower."""
    world = World(capacity=4, blocks=40, budget=budget, caching=False, end=NEVER)
    common, together = [0, 1, 2, 3, 4] * 4, 0
    for last in range(4):
        world.submit(str(last), [*common, last], max_tokens=3)
    while world.scheduler.busy:
        world.step()
        c, rows = world.columns, world.scheduler._running
        rows = rows[c.context[rows] >= len(common)]
        assert (c.blocks[rows, :5] == c.blocks[rows[:1], :5]).all()
        together = max(together, len(rows))
    assert together == 4 and world.forwarded == len(common) + 4 * 3


# orders


def test_requests_begin_in_the_order_in_which_they_came():
    world = World(capacity=2, end=NEVER)
    for name in "abcd":
        world.submit(name, [1, 2, 3])
    world.step()
    assert running(world) == ["a", "b"]
    world.run_all()
    world.check_whole()


def test_priority_goes_first_and_takes_the_place_of_lower_ones():
    world = World(capacity=2, order="priority", end=NEVER)
    for name in "ab":
        world.submit(name, [1, 2, 3], max_tokens=12, priority=5)
    world.step()
    world.submit("low", [2], max_tokens=2, priority=7)
    world.submit("urgent", [3], max_tokens=4, priority=0)
    world.step()
    assert running(world) == ["urgent", "a"]
    assert world.scheduler.counts.preemptions == 1
    assert world.run_all() == ["urgent", "a", "low", "b"], "low gets the row of a, when b has its own back"
    assert world.outputs["b", 0] == expected_of([1, 2, 3], 12)


def expected_of(prompt, max_tokens):
    return expected(World().submit("x", prompt, max_tokens), 0, NEVER)


def test_the_earliest_deadline_goes_first():
    world = World(capacity=1, order="deadline", end=NEVER)
    world.submit("running", [1, 1])
    world.step()
    for name, deadline in [("never", float("inf")), ("late", 50.0), ("soon", 2.0)]:
        world.submit(name, [1, 2, 3], deadline=deadline)
    assert world.run_all() == ["running", "soon", "late", "never"]


def test_a_long_request_is_not_overtaken_by_short_ones_that_would_fit():
    world = World(capacity=4, blocks=8, end=NEVER)
    world.submit("running", [1] * 16, max_tokens=4)
    world.submit("long", [2] * 19, max_tokens=4)
    world.submit("short", [1, 2], max_tokens=1)
    world.step()
    assert running(world) == ["running"]


# memory


def test_the_first_is_never_put_back_and_all_end_in_a_pool_for_one():
    world = World(capacity=5, blocks=LONGEST // 4, caching=False, end=NEVER)
    for index in range(5):
        world.submit(str(index), [index % 3, 1], max_tokens=20)
    while world.scheduler.busy:
        first = running(world)[:1]
        world.step()
        world.check()
        assert not first or first[0] in world.finished or running(world)[:1] == first
    assert sorted(world.finished) == list("01234")


def test_what_costs_least_to_bring_back_gives_way():
    world = World(capacity=3, blocks=10, caching=False, end=NEVER)
    world.submit("first", [1] * 12, max_tokens=12)
    world.submit("long", [2] * 15, max_tokens=9)
    world.submit("short", [0] * 5, max_tokens=9)
    world.scheduler._has_room = lambda *_: True  # as after a forecast that was too hopeful
    while not world.scheduler.counts.preemptions:
        world.step()
    assert running(world)[:2] == ["first", "long"]
    world.run_all()
    world.check_whole()


def test_blocks_that_leave_come_back_from_host_memory():
    world = World(capacity=1, blocks=7, host_slots=20, end=NEVER)
    for _ in range(2):
        for first in range(3):
            world.submit(f"{first} {world.steps}", [first] * 20, max_tokens=1)
            world.run_all()
    counts = world.kv.counts
    assert counts.fetched > 0 and counts.offloaded > 0
    assert world.forwarded < 6 * 20
    world.check_whole()


def test_without_a_gain_nothing_goes_to_host_memory():
    world = World(capacity=1, blocks=7, host_slots=20, end=NEVER)
    world.kv.keep_on_host = False
    for first in range(3):
        world.submit(str(first), [first] * 20, max_tokens=1)
        world.run_all()
    assert world.kv.counts.evicted["lru"] > 0 and world.kv.counts.offloaded == 0


def test_host_memory_forgets_what_was_used_longest_ago():
    tier = HostTier(2)
    assert [tier.put(digest, set()) for digest in (b"a", b"b")] == [0, 1]
    assert tier.find(b"a") == 0
    assert tier.put(b"c", set()) == 1 and tier.find(b"b") is None
    assert tier.put(b"d", {0, 1}) is None and len(tier) == 2


# the token budget


def test_decodes_come_first_and_the_first_prompt_leaves_room_for_shorter_ones():
    world = World(budget=6, end=NEVER)
    world.submit("decoding", [1, 2], max_tokens=20)
    world.step()
    world.submit("long", [0] * 12)
    world.submit("behind", [2] * 4)
    chunks = []
    for _ in range(3):
        batch = world.step()
        chunks.append([len(batch.decode), *world.columns.new[batch.prefill].tolist()])
    assert chunks == [[1, 3, 2], [1, 3, 2], [2, 4]]


def test_decodes_beyond_the_budget_still_let_one_prompt_token_through():
    world = World(capacity=3, budget=2, end=NEVER)
    world.submit("one", [1], max_tokens=9)
    world.submit("two", [2], max_tokens=9)
    world.step()
    world.submit("three", [0] * 3, max_tokens=1)
    batch = world.step()
    assert (len(batch.decode), world.columns.new[batch.prefill].tolist()) == (2, [1])
    assert set(world.run_all()) == {"one", "two", "three"}


# what is refused


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, "the prompt is empty; accepted: at least one token"),
        ([1] * 24, 1, "the prompt has 24 tokens; accepted: at most 23, as the context is 24"),
        ([1] * 10, 9, "prompt and max_tokens need 5 KV blocks; accepted: at most 4"),
    ],
)
def test_what_can_never_run_is_refused_in_one_line(prompt, max_tokens, message):
    world = World(blocks=4, end=NEVER)
    with pytest.raises(UserError) as error:
        world.submit("bad", prompt, max_tokens)
    assert str(error.value) == message and not isinstance(error.value, QueueFull)
    world.check_whole()


def test_an_id_in_use_is_refused_whether_it_waits_or_runs():
    world = World(capacity=1, end=NEVER)
    world.submit("runs", [1])
    world.step()
    world.submit("waits", [1])
    for name in ("runs", "waits"):
        with pytest.raises(UserError, match=f"^request id '{name}' is in use; accepted: a new one$"):
            world.submit(name, [2])
    world.run_all()
    world.submit("runs", [2])


def test_a_full_queue_refuses_whole_requests():
    world = World(capacity=1, max_queue=3, end=NEVER)
    world.submit("a", [1], n=2)
    with pytest.raises(
        QueueFull, match=r"^2 sequences wait and this request has 2; accepted: at most 3 in all$"
    ):
        world.submit("b", [1], n=2)
    world.submit("c", [1])
    assert world.scheduler.counts.refused == 1 and world.scheduler.waiting == 3
    world.run_all()
    world.check_whole()


# the pool


def test_more_blocks_than_are_free_are_refused_and_none_is_taken():
    pool = BlockPool(5)
    pool.take(3)
    with pytest.raises(MemoryError, match="2 KV blocks wanted, 1 of 4 are free"):
        pool.take(2)
    assert pool.free == 1


def test_a_block_that_two_hold_stays_until_both_let_go():
    pool = BlockPool(5)
    blocks = pool.take(2)
    pool.hold(blocks)
    pool.release(blocks)
    assert pool.used == 2
    pool.release(blocks)
    assert pool.used == 0 and pool.free == 4


def test_a_block_that_is_known_stays_idle_until_it_is_dropped():
    pool = BlockPool(5)
    blocks = pool.take(2)
    pool.indexed[blocks[0]] = True
    assert pool.release(blocks).tolist() == blocks[:1].tolist()
    assert (pool.used, pool.idle, pool.free, pool.available) == (0, 1, 3, 4)
    pool.hold(blocks[:1])
    assert (pool.used, pool.idle) == (1, 0)
    pool.release(blocks[:1])
    pool.drop(np.array(blocks[:1]))
    assert (pool.idle, pool.free) == (0, 4)
