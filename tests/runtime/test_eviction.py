"""What the pass keeps is kept because of it, and copies made ahead change nothing."""

import numpy as np
import pytest
from world import NEVER, World

from sagellm import backends
from sagellm.batch import Batch
from sagellm.ir.lower import lower, step_graph
from sagellm.passes import pipeline
from sagellm.passes.driver import PassContext, StepView


def served(policy: str | None, **settings) -> World:
    """Five prompts, one after another and then again, in a cache for two."""
    world = World(capacity=1, end=NEVER, policy=policy, **{"blocks": 12} | settings)
    for turn in range(2):
        for first in range(5):
            world.submit(f"{first} {turn}", [first] * 20, max_tokens=1)
            world.run_all()
            world.check()
    world.check_whole()
    return world


def test_without_the_pass_nothing_is_kept():
    world = served(None, host_slots=40, blocks=100)
    counts = world.kv.counts
    assert world.forwarded == 10 * 20 and counts.hit == counts.fetched == counts.offloaded == 0
    assert world.pool.free == world.pool.total and set(counts.evicted) == {"not kept"}
    lookup = world.kv.lookup(world.kv.chain(""), np.zeros(20, np.int32), length=20)
    assert lookup.miss.startswith("not kept, as no sequence held it")


def test_without_the_pass_sequences_that_run_together_still_share():
    world = World(capacity=2, end=NEVER, policy=None)
    world.submit("a", [1] * 20, max_tokens=4)
    world.step()
    world.submit("b", [1] * 20, max_tokens=4)
    world.run_all()
    assert world.kv.counts.hit == 19


def test_with_it_what_fits_is_found():
    assert served("lru", blocks=100).kv.counts.hit == 5 * 19


def test_blocks_are_copied_ahead_of_their_turn_and_come_back():
    world = served("lru", host_slots=40)
    assert world.kv.counts.fetched >= 5 * 16 and world.forwarded < 5 * 20 + 5 * 8


def test_drop_only():
    kept = World(blocks=12, capacity=1, host_slots=40)
    dropped = pipeline("kv-eviction-placement{policy=lru offload=false}")
    dropped.prepare(kept.view)
    kept.pipeline = dropped
    for first in range(5):
        kept.submit(str(first), [first] * 20, max_tokens=1)
        kept.run_all()
    assert kept.kv.counts.evicted["lru"] and not kept.kv.counts.offloaded


def test_the_graph_of_a_step_that_makes_room():
    """Decided, lowered and rewritten: the copies made ahead stand behind the forward."""
    world = World(capacity=1, blocks=12, host_slots=40, end=NEVER)
    for first in range(3):
        world.submit(str(first), [first] * 20, max_tokens=1)
        if first < 2:
            world.run_all()
    batch = world.schedule()
    assert len(batch.leaving) and len(batch.ahead)
    graph = step_graph(lower(batch, vocab_size=8))
    context = PassContext(backends.load("cpu").capability)
    pipeline("kv-eviction-placement").run(graph, "batch", context, "full")
    names = [op.name for op in graph.walk() if op.name.startswith(("kv.", "batch."))]
    assert names.index("kv.offload") < names.index("kv.allocate") < names.index("batch.forward")
    assert names[names.index("batch.forward") + 1] == "kv.offload"
    assert [r.done for r in context.remarks] == [True, False, True]


def test_a_copy_that_a_failed_step_did_not_make_is_made_before_its_block_is_overwritten():
    world = World(capacity=1, blocks=12, host_slots=40, end=NEVER)
    for first in range(3):
        world.submit(str(first), [first] * 20, max_tokens=1)
        if first < 2:
            world.run_all()
    world.step(breaks=lambda row: True)
    ahead = list(world.kv.moves.ahead)
    world.submit("next", [9] * 20, max_tokens=1)
    world.step()
    for first in range(3):
        world.submit(f"again {first}", [first] * 20, max_tokens=1)
        world.run_all()
        world.check()
    assert ahead


def waiting() -> World:
    """One row, which runs; the beginning of what waits is in host memory."""
    world = World(capacity=1, blocks=12, host_slots=40, end=NEVER)
    for first in range(4):
        world.submit(str(first), [first] * 20, max_tokens=1)
        world.run_all()
    world.submit("runs", [9] * 5, max_tokens=4)
    world.step()
    world.submit("waits", [0] * 20, max_tokens=1)
    return world


def operations(batch: Batch) -> list[str]:
    """Of the step's graph, as the pass leaves it."""
    graph = step_graph(lower(batch, vocab_size=8))
    context = PassContext(backends.load("cpu").capability)
    pipeline("kv-eviction-placement").run(graph, "batch", context, "full")
    return [op.name for op in graph.walk() if op.name.startswith(("kv.", "batch."))]


def test_what_waits_has_its_blocks_fetched_beside_a_step_before_its_own():
    world = waiting()
    batch = world.schedule()
    names = operations(batch)
    assert batch.coming == 5 and names.index("kv.fetch") > names.index("batch.forward")
    world.run(batch, lambda row: False)
    world.check()
    while world.scheduler.running and world.scheduler.waiting:
        batch = world.schedule()
        assert "kv.fetch" not in operations(batch)
        world.run(batch, lambda row: False)
        world.check()
    batch = world.schedule()
    assert world.scheduler.waiting == 0 and "kv.fetch" not in operations(batch)
    forwarded = world.forwarded
    world.run(batch, lambda row: False)
    assert world.forwarded - forwarded == 1, "its last token"
    assert world.kv.counts.fetched == 20 and world.kv.counts.fetched_ahead == 5
    world.check_whole()


def test_nothing_is_fetched_for_what_was_aborted():
    world = waiting()
    world.scheduler.abort("waits")
    batch = world.step()
    assert not batch.coming and not world.kv.counts.fetched_ahead
    world.run_all()
    world.check_whole()


def test_what_was_fetched_for_an_aborted_request_makes_room_like_any_other_block():
    world = waiting()
    world.step()
    assert world.kv.counts.fetched_ahead == 5
    world.scheduler.abort("waits")
    world.step()
    left = world.kv.first_to_leave(world.pool.idle)
    assert len(left) == world.pool.idle and not len(world.kv._promised)
    for first in range(5, 8):
        world.submit(str(first), [first] * 20, max_tokens=1)
        world.run_all()
        world.check()
    lookup = world.kv.lookup(world.kv.chain(""), np.zeros(20, np.int32), length=20)
    assert lookup.blocks.count(-1) >= 4 and world.kv.counts.fetched_ahead == 5
    world.check_whole()


def test_what_waits_keeps_its_blocks_until_others_are_gone():
    world = World(capacity=1, blocks=12, end=NEVER)
    for first in range(2):
        world.submit(str(first), [first] * 20, max_tokens=1)
        world.run_all()
    world.submit("runs", [9] * 3, max_tokens=15)
    world.step()
    world.submit("waits", [0] * 20, max_tokens=1)
    world.run_all()
    assert world.kv.counts.evicted["lru"] >= 3
    assert world.kv.counts.hit == 19, "lru alone would drop these first"


def test_a_fetch_that_a_failed_step_did_not_make_is_made_before_its_blocks_are_read():
    world = waiting()
    world.step(breaks=lambda row: True)
    assert len(world.kv.moves.fetch_ahead) == 5
    batch = world.schedule()
    names = operations(batch)
    assert names.index("kv.fetch") < names.index("batch.forward")
    world.run(batch, lambda row: False)
    world.check_whole()


@pytest.mark.parametrize("first, then", [("lru", "lifetime"), ("lifetime", "s3-fifo")])
def test_another_policy_takes_over_while_running(first, then):
    world = World(capacity=1, blocks=12, policy=first, end=NEVER)
    for at in range(8):
        if at == 4:
            world.kv.change_policy(then)
        world.submit(str(at), [at] * 20, max_tokens=1)
        world.run_all()
        world.check()
    assert world.kv.counts.evicted[first] and world.kv.counts.evicted[then]


def test_it_decides_nothing_about_a_batch_outside_an_engine():
    world = World()
    batch = Batch(world.columns, np.zeros(0, np.int64), np.zeros(0, np.int64))
    pipeline("kv-eviction-placement").decide(batch, StepView())
    assert not len(batch.leaving) and not batch.notes
