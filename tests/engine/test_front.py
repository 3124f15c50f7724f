"""Streams for any thread and event loop; a core in its own process may die at any moment and nobody loses a token."""

import asyncio
import os
import random
import threading

import numpy as np
import pytest
from checkpoints import random_tokens, save_checkpoint, save_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from sagellm.batch import Request, SamplingParams
from sagellm.engine.base import EngineState, GenerateRequest, KVHandle
from sagellm.engine.engine import SageLLMEngine
from sagellm.engine.events import StepEvents
from sagellm.engine.wire import pack, unpacker
from sagellm.errors import QueueFull, UserError

pytest_plugins = ["checkpoints"]

KILLS = 50 if int(os.environ.get("SAGELLM_EXAMPLES", "0")) >= 1000 else 3


POSITIONS = 4096
ENDLESS = 4000
"""Tokens: a core makes so many while its reader is held up, and has not come to the end."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model of `text_checkpoint`, with room for long answers."""
    made = tmp_path_factory.mktemp("long")
    save_tokenizer(made)
    return str(save_checkpoint(made, "Qwen2ForCausalLM", eos_token_id=0, max_position_embeddings=POSITIONS))


@pytest.fixture(scope="module")
def inline(folder):
    with SageLLMEngine(folder, max_sequences=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def process(folder):
    with SageLLMEngine(folder, max_sequences=8, core="process") as engine:
        yield engine


@pytest.fixture(params=["inline", "process"])
def engine(request):
    return request.getfixturevalue(request.param)


def ask(prompt, **how):
    fields = {name: how.pop(name) for name in ("id", "priority", "salt", "deadline", "resume") if name in how}
    return GenerateRequest(prompt=prompt, sampling=SamplingParams(**{"max_tokens": 20, **how}), **fields)


PROMPTS = ["The quick brown fox", "中文", "naïve café 🙂", "The quick", "x", list(range(40)), [7] * 33]


def requests(count, seed=0, **how):
    """Greedy and seeded ones, some of several samples, some with a stop string."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        sampled = {"temperature": 1.2, "seed": draw.randrange(2**40)} if i % 2 else {}
        several = {"n": 2} if i % 5 == 3 else {}
        stop = {"stop": ("e", "的")} if i % 7 == 6 else {}
        made.append(ask(PROMPTS[i % len(PROMPTS)], ignore_eos=True, **sampled, **several, **stop, **how))
    return made


async def consume(engine, request, seen=None):
    """The text of each sample, from its events alone; indices must go up one by one."""
    texts, counts, reasons = {}, {}, {}
    stream = engine.stream(request)
    async for event in stream:
        sample = event.sample
        assert event.index == counts.get(sample, 0), "a token was lost or came twice"
        assert sample not in reasons, "a token after the end"
        counts[sample] = event.index + len(event.ids)
        texts[sample] = texts.get(sample, "") + event.text
        if event.finish_reason:
            reasons[sample] = event.finish_reason
        if seen is not None:
            seen(len(event.ids))
    assert texts == {i: output.text for i, output in enumerate(stream.result.outputs)}
    return texts, reasons


def gather(engine, some, seen=None):
    async def run():
        return await asyncio.gather(*(consume(engine, request, seen) for request in some))

    return asyncio.run(run())


def test_many_streams_at_once_give_what_each_gives_alone(engine):
    some = requests(20)
    assert gather(engine, some) == [gather(engine, [request])[0] for request in some]


def test_threads_and_event_loops_share_the_steps(inline):
    some = requests(12, max_tokens=30)
    expected = gather(inline, some)
    found = {}

    def work(first):
        found[first] = gather(inline, some[first : first + 3])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(0, 12, 3)]
    for thread in threads:
        thread.start()
    texts = [result.text for result in inline.generate(["x"] * 3, SamplingParams(max_tokens=5))]
    for thread in threads:
        thread.join()
    assert len(set(texts)) == 1
    assert [one for first in range(0, 12, 3) for one in found[first]] == expected


def test_a_request_can_be_awaited_and_tells_what_was_cached(engine):
    request = ask(random_tokens(50, 3), salt="tells")
    first, again = (asyncio.run(engine.generate(request)) for _ in range(2))
    assert first.token_ids == again.token_ids
    assert (first.cached_tokens, first.cache_miss) == (0, "never seen")
    assert (again.cached_tokens, again.cache_miss) == (48, "below one block: 2 of 16 tokens")
    assert again.ttft > 0 and again.tpot > 0


def test_an_abort_ends_the_stream_and_frees_its_blocks_within_a_step(engine):
    async def run():
        stream = engine.stream(ask("x", id="gone", max_tokens=ENDLESS, ignore_eos=True))
        async for event in stream:
            if event.index == 3:
                assert await engine.abort("gone")
        return stream.result

    result = asyncio.run(run())
    assert result.finish_reason == "abort" and 4 <= len(result.token_ids) < ENDLESS
    stats = engine.stats()
    assert (stats.running, stats.kv_blocks_used) == (0, 0)
    assert not asyncio.run(engine.abort("gone"))


def test_refusals_come_at_submission_and_harm_nobody(engine):
    async def run():
        begun = asyncio.Event()
        long = ask("x", id="here", max_tokens=400, ignore_eos=True)
        running = asyncio.create_task(consume(engine, long, lambda tokens: begun.set()))
        await begun.wait()
        with pytest.raises(UserError, match="request id 'here' is in use; accepted: a new one"):
            await engine.generate(ask("y", id="here"))
        with pytest.raises(UserError, match="token id 300 in the prompt; accepted: 0 to 299"):
            await engine.generate(ask([300]))
        with pytest.raises(UserError, match="the prompt is empty"):
            await engine.generate(ask(""))
        return await running

    assert asyncio.run(run())[1] == {0: "length"}


def test_a_full_queue_refuses_with_numbers(text_checkpoint):
    with SageLLMEngine(str(text_checkpoint), max_sequences=1, max_queue=2) as engine:

        async def run():
            some = [ask("x", max_tokens=150, ignore_eos=True) for _ in range(8)]
            return await asyncio.gather(*map(engine.generate, some), return_exceptions=True)

        results = asyncio.run(run())
        full = [r for r in results if isinstance(r, QueueFull)]
        assert full and len(full) < 8
        assert str(full[0]) == "2 sequences wait and this request has 1; accepted: at most 2 in all"
        assert len({r.text for r in results if r not in full}) == 1
        assert engine.stats().refused == len(full)


def test_draining_takes_nothing_new_and_finishes_what_there_is(text_checkpoint):
    engine = SageLLMEngine(str(text_checkpoint), max_sequences=4)
    stream = engine.stream(ask("x", max_tokens=100, ignore_eos=True))
    next(stream)
    assert engine.drain(30)
    assert engine.state is EngineState.DRAINING
    with pytest.raises(UserError, match="the engine is draining"):
        engine.stream("y")
    assert len(stream.wait().token_ids) == 100
    asyncio.run(engine.stop())
    assert engine.state is EngineState.STOPPED
    asyncio.run(engine.start())
    assert asyncio.run(engine.health()).ready
    assert engine.generate("x", SamplingParams(max_tokens=3))[0].finish_reason == "length"
    running = engine.stream(ask("x", max_tokens=200, ignore_eos=True))
    engine.shutdown()
    assert running.wait().finish_reason == "abort"


# a core that dies


def test_a_killed_core_costs_a_pause_and_no_token(process, inline):
    """Killed at random moments under load: greedy and seeded streams end with the text they would have had."""
    draw = random.Random(1)
    for round in range(KILLS):
        some = requests(14, seed=round, max_tokens=40)
        expected = gather(inline, some)
        left = draw.randrange(14 * 40)

        def seen(tokens):
            nonlocal left
            left -= tokens
            if left < 0 <= left + tokens:
                process.front.link.process.kill()

        before = process.front.restarts
        assert gather(process, some, seen) == expected
        assert process.front.restarts <= before + 1
    assert process.stats().restarts >= KILLS - 1
    assert asyncio.run(process.health()).ready


def test_a_killed_core_costs_a_stream_that_was_begun_elsewhere_nothing(process, inline):
    how = {"temperature": 1.2, "seed": 4, "max_tokens": 60, "ignore_eos": True}
    whole = inline.generate(["x"], SamplingParams(**how))[0]
    stream = process.stream(ask("x", resume=whole.token_ids[:20], **how))
    for event in stream:
        if event.index == 25:
            process.front.link.process.kill()
    assert (stream.result.token_ids, stream.result.text) == (whole.token_ids, whole.text)
    (end,) = process.stream(ask("x", resume=whole.token_ids, **how))
    assert end.finish_reason == "length" and end.ids == ()


def test_a_core_that_never_lives_to_give_a_token_is_given_up(text_checkpoint):
    with SageLLMEngine(str(text_checkpoint), core="process", max_restarts=0) as engine:
        stream = engine.stream(ask("x", max_tokens=200, ignore_eos=True))
        engine.front.link.process.kill()
        result = stream.wait()
        if result.finish_reason == "error":
            assert "the core was lost 1 times without a token between (signal 9)" in result.error
        with pytest.raises(UserError, match="the core was lost"):
            engine.generate("x")
        assert engine.state is EngineState.ERROR


@pytest.mark.parametrize("core", ["inline", "process"])
def test_a_model_that_cannot_be_loaded_is_one_line(core, tmp_path):
    with pytest.raises(UserError) as error:
        SageLLMEngine(str(tmp_path / "nothing"), core=core)
    assert "\n" not in str(error.value)


# keys and values elsewhere


def test_another_engine_decodes_from_a_handle(process, inline, tmp_path):
    request = ask(random_tokens(70, 8), max_tokens=10, salt="elsewhere")
    expected = asyncio.run(inline.generate(request))

    async def run():
        handle = await process.prefill(request)
        handle.save(tmp_path / "handle.safetensors")
        handle = KVHandle.load(tmp_path / "handle.safetensors")
        before = fresh.stats().forwarded
        events = [event async for event in fresh.decode(request, handle)]
        return handle, events, fresh.stats().forwarded - before

    with SageLLMEngine(str(inline.config.model), max_sequences=2) as fresh:
        handle, events, forwarded = asyncio.run(run())
        assert len(handle.tokens) == 64
        assert [event.ids[0] for event in events] == expected.token_ids
        assert forwarded == 70 - 64 + 9, "the rest of the prompt, and each token but the last"
    with (
        SageLLMEngine(str(inline.config.model), max_sequences=2, block_size=8) as other,
        pytest.raises(UserError, match=r"keys and values of .*; accepted: those of .*"),
    ):
        asyncio.run(anext(other.decode(request, handle)))


# the wire


arrays = st.lists(st.integers(0, 127), max_size=5)


@given(numbers=arrays, logprob=st.floats(-50, 0), text=st.text(max_size=9), cuts=st.integers(1, 40))
def test_messages_survive_the_wire_in_any_pieces(numbers, logprob, text, cuts):
    count = len(numbers)
    columns = (np.array(numbers, t) for t in (np.int64, np.int64, np.int32, np.int64, np.int8))
    events = StepEvents(*columns, dict.fromkeys(range(count), (logprob, ((1, logprob),))))
    how = SamplingParams(stop=(text,) if text else (), logit_bias={5: 1.5}, n=3, seed=9)
    request = Request(text, numbers, how, output=[numbers, []], ended=(2,))
    data = pack(("step", events)) + pack(("submit", 3, request, True))
    reader, found = unpacker(), []
    for first in range(0, len(data), cuts):
        reader.feed(data[first : first + cuts])
        found += reader
    (kind, step), (_, number, again, resumed) = found
    assert (kind, number, resumed) == ("step", 3, True)
    for name in StepEvents.COLUMNS:
        mine, theirs = getattr(events, name), getattr(step, name)
        assert mine.dtype == theirs.dtype and mine.tolist() == theirs.tolist()
    assert {i: value[0] for i, value in step.logprobs.items()} == dict.fromkeys(range(count), logprob)
    assert (again.id, again.prompt, again.sampling, again.output) == (text, numbers, how, [numbers, []])
    assert again.deadline == request.deadline and tuple(again.ended) == (2,)
