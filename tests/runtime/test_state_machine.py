"""Whatever happens in whatever order: no block is lost or owned twice, every sequence finds what it wrote, all end."""

import os

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from world import LONGEST, VOCABULARY, World, expected

from sagellm.kv.policies import POLICIES

STEPS = 50
EXAMPLES = int(os.environ.get("SAGELLM_EXAMPLES", "40"))
"""40 are 2,000 steps, 2,000 are 100,000."""

tokens = st.integers(0, VOCABULARY - 1)
beginnings = st.sampled_from([[], [0] * 3, [0] * 8, [0] * 11, [0, 1] * 6, [0] * 8 + [1] * 8])
prompts = st.builds(
    lambda a, b: (a + b)[: LONGEST - 1], beginnings, st.lists(tokens, min_size=1, max_size=12)
)


class Machine(RuleBasedStateMachine):
    @initialize(
        capacity=st.integers(1, 5),
        blocks=st.integers(LONGEST // 4, 20),
        budget=st.integers(1, 40),
        order=st.sampled_from(["fcfs", "priority", "deadline"]),
        host_slots=st.sampled_from([0, 0, 2, 9]),
        caching=st.sampled_from([True, True, True, False]),
        dedup=st.booleans(),
        policy=st.sampled_from([None, *POLICIES]),
    )
    def begin(self, **settings):
        self.world = World(**settings)
        self.requests, self.cut = {}, set()

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 12),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        salt=st.sampled_from(["", "", "a", "b"]),
        priority=st.integers(0, 2),
        deadline=st.sampled_from([1.0, 9.0, float("inf")]),
    )
    def submit(self, prompt, max_tokens, n, **fields):
        name = f"request {len(self.requests)}"
        self.requests[name] = self.world.submit(name, prompt, max_tokens, n, **fields)

    @rule(steps=st.integers(1, 5))
    def step(self, steps):
        for _ in range(steps):
            if self.world.scheduler.busy:
                first = self.eldest()
                self.world.step()
                assert first is None or first.dropped or first.row >= 0 or self.over(first), (
                    "the first gave way"
                )

    def eldest(self):
        running = self.world.scheduler._running
        return self.world.scheduler.sequences[int(running[0])] if len(running) else None

    def over(self, sequence):
        """Ended, or put back for one of higher priority."""
        world = self.world
        return sequence not in list(world.scheduler.queued()) or world.scheduler.order == "priority"

    @precondition(lambda self: self.world.scheduler.busy)
    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from(sorted(self.world.scheduler.numbers)))
        self.cut.add(name)
        self.world.scheduler.abort(name)

    @precondition(lambda self: self.world.scheduler.busy)
    @rule(data=st.data())
    def cancel_a_sample(self, data):
        name = data.draw(st.sampled_from(sorted(self.world.scheduler.numbers)))
        sample = data.draw(st.integers(0, self.requests[name].sampling.n - 1))
        self.cut.add((name, sample))
        self.world.scheduler.drop_sample(name, sample)

    @precondition(lambda self: self.world.scheduler.running > 0)
    @rule(data=st.data())
    def preempt(self, data):
        rows = self.world.scheduler._running.tolist()
        self.world.scheduler.preempt(data.draw(st.sampled_from(rows)))

    @precondition(lambda self: self.world.scheduler.running > 0)
    @rule(data=st.data())
    def fault(self, data):
        """A kernel raises for some of the sequences."""
        rows = self.world.scheduler._running.tolist()
        bad = set(data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=2)))
        sequences = self.world.scheduler.sequences
        names = {(sequences[row].request.id, sequences[row].sample) for row in bad}

        def breaks(row):
            sequence = sequences[row]
            if (sequence.request.id, sequence.sample) not in names:
                return False
            self.cut.add((sequence.request.id, sequence.sample))
            return True

        self.world.step(breaks)

    @precondition(lambda self: self.world.kv.policy is not None)
    @rule(policy=st.sampled_from(sorted(POLICIES)))
    def change_the_policy(self, policy):
        self.world.kv.change_policy(policy)

    @rule()
    def forget_what_is_cached(self):
        self.world.kv.reset()

    @invariant()
    def holds(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if not hasattr(self, "world"):
            return
        world = self.world
        to_do = sum(LONGEST * r.sampling.n for r in self.requests.values())
        world.run_all(10 + 2 * to_do)
        world.check_whole()
        for name, request in self.requests.items():
            for sample in range(request.sampling.n):
                whole, got = expected(request, sample), world.outputs.get((name, sample), [])
                if name in self.cut or (name, sample) in self.cut:
                    assert got == whole[: len(got)]
                else:
                    assert got == whole


Machine.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=STEPS)
test_scheduler_and_kv = Machine.TestCase
