"""Every sequence gets its turn and its blocks, finds in them what it wrote, and gives everything back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.batch import Columns, Phase, Request, SamplingParams
from sagellm.errors import UserError
from sagellm.passes.driver import Pipeline
from sagellm.passes.prefix_dedup import PrefixDedup
from sagellm.rows import build_rows
from sagellm.runtime.pool import BlockPool
from sagellm.runtime.scheduler import Scheduler

BLOCK, LONGEST = 4, 24


class Runner:
    """Steps without a model: the cache holds, per token, a number that stands for all tokens up to it."""

    def __init__(self, capacity=4, blocks=24, budget=100, dedup=True):
        self.columns = Columns(capacity, LONGEST, BLOCK)
        self.pool = BlockPool(blocks + 1)
        self.scheduler = Scheduler(self.columns, self.pool, budget)
        self.dedup = dedup
        self.cache = np.zeros((blocks + 1) * BLOCK, np.int64)
        self.finished: dict[str, list[int]] = {}
        self.forwarded = 0

    def submit(self, name, prompt, max_tokens=4):
        self.scheduler.submit(Request(name, prompt, SamplingParams(max_tokens=max_tokens)), seed=0)

    def step(self):
        c, batch = self.columns, self.scheduler.propose()
        pipeline = Pipeline([PrefixDedup()] if self.dedup else [])
        pipeline.decide(batch)
        if self.scheduler.fit(batch):
            pipeline.decide(batch)
        assert len(batch.decode) + self.to_forward(batch) <= max(self.scheduler.budget, len(batch.decode) + 1)
        shared = Phase.PREFILL in batch.facts
        self.pool.extend(c, batch.decode)
        (self.pool.extend_shared if shared else self.pool.extend)(c, batch.prefill)
        rows = build_rows(batch, shared=shared)
        self.forwarded += rows.forwarded
        self.write(batch, rows)
        outputs = batch.output_rows().tolist()
        for row in [*batch.decode, *batch.prefill]:
            self.check(row, c.context[row] + c.new[row])
            c.context[row] += c.new[row]
        for row in outputs:
            request = self.scheduler.requests[row]
            c.tokens[row, c.length[row]] = self.stands_for(row, c.length[row] - 1) % 3
            c.length[row] += 1
            if c.length[row] >= self.scheduler.limit(request):
                self.finished[request.id] = c.tokens[row, c.prompt[row] : c.length[row]].tolist()
                self.scheduler.finish(row)
        return batch

    def to_forward(self, batch):
        return int((self.columns.new - self.columns.shared)[batch.prefill].sum())

    def write(self, batch, rows):
        """As a backend does it: one number for each token on the flattened axis, which knows its position only."""
        c = self.columns
        owner = {
            (int(c.blocks[row, p // BLOCK]) * BLOCK + p % BLOCK): row for row, p in self.new_places(batch)
        }
        numbers = np.array(
            [self.stands_for(owner[slot], position) for slot, position in zip(rows.slots, rows.positions)]
        )
        self.cache[rows.slots] = numbers if rows.kv_source is None else numbers[rows.kv_source]

    def new_places(self, batch):
        c = self.columns
        for row in [*batch.decode.tolist(), *batch.prefill.tolist()]:
            for position in range(c.context[row], c.context[row] + c.new[row]):
                yield row, position

    def stands_for(self, row, position):
        return hash(tuple(self.columns.tokens[row, : position + 1].tolist())) % 1_000_003

    def check(self, row, count):
        """The first `count` places of the row's block table hold what its tokens stand for."""
        c = self.columns
        for position in range(count):
            found = self.cache[c.blocks[row, position // BLOCK] * BLOCK + position % BLOCK]
            assert found == self.stands_for(row, position), f"row {row}, position {position}"

    def run(self):
        while self.scheduler.busy:
            self.step()
        return self.finished


def assert_all_free(runner):
    assert runner.pool.used == 0
    assert runner.pool.references[1:].sum() == 0
    assert len(set(runner.pool._free.tolist())) == len(runner.pool._free)
    assert sorted(runner.scheduler._free) == list(range(runner.columns.capacity))
    assert not runner.scheduler.requests and not runner.scheduler.waiting
    assert runner.scheduler._reserved.sum() == 0


tokens = st.integers(0, 2)
beginnings = st.sampled_from([[], [0] * 3, [0] * 8, [0] * 11, [0, 1] * 6])
prompts = st.builds(
    lambda a, b: (a + b)[: LONGEST - 1], beginnings, st.lists(tokens, min_size=1, max_size=20)
)


@settings(max_examples=150, deadline=None)
@given(
    jobs=st.lists(st.tuples(prompts, st.integers(1, 9)), min_size=1, max_size=9),
    capacity=st.integers(1, 5),
    budget=st.integers(1, 40),
    blocks=st.integers(LONGEST // BLOCK, 20),
    aborts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8)), max_size=3),
)
def test_sharing_chunking_and_waiting_change_no_sequence(jobs, capacity, budget, blocks, aborts):
    """Each sequence reads its own beginning from the cache at every step, and ends with the tokens it has alone."""
    runner = Runner(capacity, blocks, budget)
    for index, (prompt, max_tokens) in enumerate(jobs):
        runner.submit(str(index), prompt, max_tokens)
    gone, steps = set(), 0
    while runner.scheduler.busy:
        runner.step()
        for row, request in list(runner.scheduler.requests.items()):
            if (steps, int(request.id)) in aborts:
                runner.scheduler.finish(row)
                gone.add(request.id)
        steps += 1
    assert_all_free(runner)
    for index, (prompt, max_tokens) in enumerate(jobs):
        if str(index) not in gone:
            alone = Runner(dedup=False)
            alone.submit("alone", prompt, max_tokens)
            assert runner.finished[str(index)] == alone.run()["alone"]


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(prompts, min_size=1, max_size=5))
def test_a_step_forwards_each_distinct_beginning_once(texts):
    """As many tokens as the trie of the prompts has nodes."""
    runner = Runner(capacity=5, blocks=30, budget=1000)
    for index, prompt in enumerate(texts):
        runner.submit(str(index), prompt, max_tokens=1)
    runner.step()
    assert runner.forwarded == len({tuple(p[: n + 1]) for p in texts for n in range(len(p))})
    assert_all_free(runner)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "hold", "release"]), st.integers(0, 6)), max_size=40))
def test_a_block_is_free_exactly_when_nobody_holds_it(operations):
    pool, held = BlockPool(9), []
    for operation, count in operations:
        if operation == "take" and count <= pool.free:
            blocks = pool.take(count)
            assert not set(blocks.tolist()) & set(held)
            held += blocks.tolist()
        elif operation == "hold":
            again = np.array(held[:count], np.int32)
            pool.hold(again)
            held += again.tolist()
        elif operation == "release":
            blocks, held = np.array(held[:count], np.int32), held[count:]
            pool.release(blocks)
        assert 0 not in held
        assert pool.used == len(set(held))
        assert pool.used + pool.free == 8


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
    assert pool.used == 0


def test_requests_begin_in_the_order_in_which_they_came():
    runner = Runner(capacity=2)
    for name in "abcd":
        runner.submit(name, [1, 2, 3])
    runner.step()
    assert [request.id for request in runner.scheduler.requests.values()] == ["a", "b"]
    assert list(runner.run()) == ["a", "b", "c", "d"]


def test_a_long_request_is_not_overtaken_by_short_ones_that_would_fit():
    runner = Runner(capacity=4, blocks=8)
    runner.submit("running", [1] * 16, max_tokens=4)
    runner.submit("long", [2] * 19, max_tokens=4)
    runner.submit("short", [1, 2], max_tokens=1)
    runner.step()
    assert [request.id for request in runner.scheduler.requests.values()] == ["running"]
    assert list(runner.run()) == ["running", "short", "long"]


def test_a_request_waits_until_all_blocks_it_can_ever_need_are_free():
    """So that a running sequence never finds the pool empty."""
    runner = Runner(capacity=4, blocks=5)
    runner.submit("one", [1], max_tokens=12)
    runner.submit("two", [2], max_tokens=12)
    runner.step()
    assert len(runner.scheduler.requests) == 1
    assert {name: len(tokens) for name, tokens in runner.run().items()} == {"one": 12, "two": 12}


def test_decodes_come_first_and_prompts_get_what_is_left_of_the_budget():
    runner = Runner(budget=6)
    runner.submit("decoding", [1, 2])
    runner.step()
    runner.submit("long", [0] * 12)
    runner.submit("behind", [2] * 4)
    chunks = []
    for _ in range(4):
        batch = runner.step()
        chunks.append([len(batch.decode), *runner.columns.new[batch.prefill].tolist()])
    assert chunks == [[1, 5], [1, 5], [1, 2, 3], [1, 1]]


def test_decodes_beyond_the_budget_still_let_one_prompt_token_through():
    runner = Runner(capacity=3, budget=2)
    runner.submit("one", [1], max_tokens=9)
    runner.submit("two", [2], max_tokens=9)
    runner.step()
    runner.submit("three", [0] * 3, max_tokens=1)
    batch = runner.step()
    assert (len(batch.decode), runner.columns.new[batch.prefill].tolist()) == (2, [1])
    assert set(runner.run()) == {"one", "two", "three"}


def test_prompt_and_output_end_where_the_context_ends():
    runner = Runner()
    runner.submit("full", [1] * (LONGEST - 1), max_tokens=99)
    assert len(runner.run()["full"]) == 1


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, "the prompt is empty; accepted: at least one token"),
        ([1] * 24, 1, "the prompt has 24 tokens; accepted: at most 23, as the context is 24"),
        ([1] * 10, 9, "prompt and max_tokens need 5 KV blocks; accepted: at most 4"),
    ],
)
def test_what_can_never_run_is_refused_in_one_line(prompt, max_tokens, message):
    runner = Runner(blocks=4)
    with pytest.raises(UserError) as error:
        runner.submit("bad", prompt, max_tokens)
    assert str(error.value) == message
    assert_all_free(runner)


def test_a_step_that_failed_and_is_tried_again_leaks_no_block():
    """Rows that share keep the blocks they got; the second attempt takes none of them again."""
    runner = Runner(budget=100)
    for name in "ab":
        runner.submit(name, [1] * (3 * BLOCK) + [ord(name) % 3], 2)
    batch = runner.scheduler.propose()
    Pipeline([PrefixDedup()]).decide(batch)
    for _ in range(3):
        runner.pool.extend_shared(runner.columns, batch.prefill)
    while runner.scheduler.busy:
        runner.step()
    assert_all_free(runner)
