"""Many requests of all kinds at once: each output is what the request gives alone, and little is computed twice."""

import random

import numpy as np
import pytest
from checkpoints import make_core, random_tokens, serve, tokens_of

from sagellm.batch import Request, SamplingParams
from sagellm.engine.planner import Planner
from sagellm.runtime.swap import SwapOrRecompute

pytest_plugins = ["checkpoints"]

COUNT = 200


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("LlamaForCausalLM", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def requests(folder):
    """(request, its arrival's step, its output alone)"""
    draw = random.Random(3)
    heads = [random_tokens(draw.choice([5, 16, 30, 64]), 100 + i) for i in range(6)]
    alone = make_core(folder, max_length=256, prefix_caching=False)
    known, made = {}, []
    for i in range(COUNT):
        head = draw.choice(heads) if draw.random() < 0.6 else []
        prompt = head + random_tokens(draw.randint(1, 60), 1000 + i)
        how = SamplingParams(max_tokens=draw.randint(1, 40), n=draw.choice([1, 1, 1, 2, 3]))
        request = Request(
            f"request {i}",
            prompt,
            how,
            priority=draw.randint(0, 3),
            deadline=draw.choice([1.0, 5.0, float("inf")]),
            salt=draw.choice(["", "", "tenant"]),
        )
        if tuple(prompt) not in known:
            (known[tuple(prompt)],) = tokens_of(serve(alone, [prompt], SamplingParams(max_tokens=40)))
        made.append((request, draw.randint(0, 300), known[tuple(prompt)][: how.max_tokens]))
    return sorted(made, key=lambda one: one[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batched_tokens": 32},
        {"max_batched_tokens": 100, "host_kv_gib": 0.001},
        {"max_batched_tokens": 48, "order": "priority"},
        {"max_batched_tokens": 48, "order": "deadline", "max_sequences": 3, "host_kv_gib": 0.01},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_two_hundred_requests_give_what_each_gives_alone(folder, requests, monkeypatch, settings):
    """In 30 blocks, with chunks, common beginnings, samples, cancellations and sequences put back by force."""
    monkeypatch.setattr(Planner, "_block_count", lambda planner: 31)
    monkeypatch.setattr(SwapOrRecompute, "swap", True)
    core = make_core(folder, block_size=8, max_length=256, **{"max_sequences": 16, **settings})
    draw, waiting, cut = random.Random(1), list(requests), set()
    outputs = {(r.id, sample): [] for r, _, _ in requests for sample in range(r.sampling.n)}
    for step in range(20_000):
        while waiting and waiting[0][1] <= step:
            core.submit(waiting.pop(0)[0])
        if not waiting and not core.busy:
            break
        if draw.random() < 0.04 and core.busy:
            name = draw.choice(list(core.scheduler.numbers))
            cut.add(name)
            assert core.abort(name) and name not in core.scheduler.numbers
            assert all(s.request.id != name for s in core.scheduler.sequences.values()), (
                "it holds nothing any more"
            )
        if draw.random() < 0.03 and core.scheduler.running > 1:
            core.scheduler.preempt(draw.choice(core.scheduler._running[1:].tolist()))
        for event in core.step():
            assert event.finish_reason != "error", event.error
            output = outputs[event.request_id, event.sample]
            assert event.index == len(output)
            output.append(event.token)
    for request, _, alone in requests:
        for sample in range(request.sampling.n):
            got = outputs[request.id, sample]
            assert got == (alone[: len(got)] if request.id in cut else alone)
    stats = core.stats()
    assert len(cut) > 10 and stats.preemptions > 10 and stats.reused > 500 and stats.copied_blocks > 10
    assert stats.evicted["lifetime"] > 0 and (stats.fetched > 0) == ("host_kv_gib" in settings)
    assert stats.running == stats.waiting == stats.kv_blocks_used == stats.failed_steps == 0


# long prompts and short ones


@pytest.mark.parametrize("busy", [0, 6])
def test_a_short_request_does_not_wait_for_a_long_prompt(folder, busy):
    """5 tokens that come in the middle of 2,000: their first token comes within two chunks."""
    core = make_core(folder, max_length=2200, max_batched_tokens=256)
    for i in range(busy):
        core.submit(
            Request(f"decodes {i}", random_tokens(4, i), SamplingParams(max_tokens=60, ignore_eos=True))
        )
    core.step()
    core.submit(Request("long", random_tokens(2000, 1), SamplingParams(max_tokens=4)))
    for _ in range(3):
        assert not [event for event in core.step() if event.request_id == "long"]
    core.submit(Request("short", random_tokens(5, 2), SamplingParams(max_tokens=4)))
    steps = 0
    seen = set()
    while "short" not in seen:
        seen |= {event.request_id for event in core.step()}
        steps += 1
    assert steps <= 2 and "long" not in seen


def test_a_long_prompt_is_not_starved_by_short_ones(folder):
    core = make_core(folder, max_length=2200, max_batched_tokens=64, max_sequences=64, max_queue=10_000)
    core.submit(Request("long", random_tokens(1000, 1), SamplingParams(max_tokens=1)))
    for step in range(40):
        for i in range(8):
            core.submit(
                Request(f"{step} {i}", random_tokens(20, 10 * step + i), SamplingParams(max_tokens=1))
            )
        if "long" in {event.request_id for event in core.step()}:
            break
    assert step <= 1000 // 32, "half of each step's tokens are its"


# what is found again


def last_began(core, prompt, **fields):
    core.submit(Request("asked", prompt, SamplingParams(max_tokens=1), **fields))
    before = core.counters.forwarded
    (began,) = core.advance().began
    while core.busy:
        core.advance()
    return began, core.counters.forwarded - before


def test_the_same_prompt_twice_is_computed_once(folder):
    core = make_core(folder, max_length=1024)
    prompt = random_tokens(512, 1)
    began, forwarded = last_began(core, prompt)
    assert (began.cached, began.miss, forwarded) == (0, "never seen", 512)
    began, forwarded = last_began(core, prompt)
    assert began.cached == 511 and forwarded == 1 <= core.kv_schema.block_size + 1
    assert began.miss == "below one block: 0 of 16 tokens"
    began, forwarded = last_began(core, [*prompt, 1, 2])
    assert (began.cached, began.miss, forwarded) == (512, "below one block: 2 of 16 tokens", 2)
    began, forwarded = last_began(core, [*prompt[:100], *random_tokens(50, 2)])
    assert (began.cached, began.miss, forwarded) == (96, "never seen", 54)
    assert core.stats().reused == 511 + 512 + 96


def test_without_the_pass_nothing_is_found_again(folder):
    core = make_core(folder, max_length=1024, pipeline="cleanup,kernel-fusion")
    for _ in range(2):
        began, forwarded = last_began(core, random_tokens(100, 1))
        assert (began.cached, began.miss, forwarded) == (0, "prefix caching is off", 100)


def test_a_tenant_finds_nothing_of_another(folder):
    core = make_core(folder, max_length=1024)
    prompt = random_tokens(100, 1)
    for salt, cached, miss in [
        ("a", 0, "never seen"),
        ("b", 0, "salt differs"),
        ("", 0, "salt differs"),
        ("a", 96, "below one block: 4 of 16 tokens"),
        ("b", 96, "below one block: 4 of 16 tokens"),
    ]:
        began, forwarded = last_began(core, prompt, salt=salt)
        assert (began.cached, began.miss, forwarded) == (cached, miss, 100 - cached)


def test_what_left_says_when_and_why(folder, monkeypatch):
    monkeypatch.setattr(Planner, "_block_count", lambda planner: 11)
    core = make_core(folder, max_length=256)
    prompt = random_tokens(100, 1)
    last_began(core, prompt)
    last_began(core, random_tokens(150, 2))
    began, _ = last_began(core, prompt)
    assert began.miss.startswith("evicted by lifetime in step 2 (used once, last 0 blocks before; "), (
        began.miss
    )
    core.kv.reset()
    began, _ = last_began(core, prompt)
    assert began.miss.startswith("cache reset, 0.")


def test_a_sequence_that_is_put_back_finds_what_it_had(folder):
    core = make_core(folder, max_length=256)
    prompt = random_tokens(64, 1)
    (alone,) = tokens_of(serve(make_core(folder, max_length=256), [prompt], SamplingParams(max_tokens=20)))
    core.submit(Request("it", prompt, SamplingParams(max_tokens=20)))
    tokens = [event.token for _ in range(10) for event in core.step()]
    core.scheduler.preempt(0)
    while core.busy:
        tokens += [event.token for event in core.step()]
    assert tokens == alone
    assert core.counters.recomputed == (64 + 9) % 16, "what was in no full block"


# faults


def test_a_kernel_that_raises_fails_those_requests_alone(folder):
    core = make_core(folder, max_length=256)
    functions, poison = core.executor.functions, 299

    def raising(name, words):
        function = functions(name, words)

        def call(*arguments):
            if name == "model" and (arguments[2].tokens == poison).any():
                raise RuntimeError("a kernel broke")
            return function(*arguments)

        return call

    core.executor.functions = raising
    prompts = [[1, 2, 3], [5, poison, 6], [7] * 20, [8, poison], [1, 2, 3, 4]]
    how = SamplingParams(max_tokens=6, logit_bias={poison: -100})
    *events, last = serve(core, [*prompts, [9]], how)
    clean = tokens_of(serve(make_core(folder, max_length=256), [*prompts, [9]], how))
    for prompt, one, alone in zip(prompts, events, clean):
        if poison in prompt:
            assert [(e.finish_reason, e.error) for e in one] == [("error", "RuntimeError: a kernel broke")]
        else:
            assert [e.token for e in one] == alone
    assert [e.token for e in last] == clean[-1]
    stats = core.stats()
    assert (
        stats.kv_blocks_used == 0 and stats.finished == {"length": 4, "error": 2} and stats.failed_steps > 0
    )
    assert np.count_nonzero(core.kv.pool.references[1:]) == 0
