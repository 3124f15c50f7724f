"""Engines die, stall and refuse: requests go elsewhere, and streams go on where they were."""

import asyncio
import itertools
import os
import signal
import threading
from typing import ClassVar

import pytest
from planes import run, served
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route
from third_party import Echo

from sagellm.control_plane import watch
from sagellm.control_plane.app import make_app
from sagellm.control_plane.calls import Call
from sagellm.control_plane.client import AsyncInferenceClient
from sagellm.control_plane.endpoint import AppEndpoint
from sagellm.control_plane.faults import FAILURES, FIRST_PAUSE, Breaker, Progress, RetryBudget
from sagellm.control_plane.manager import ControlPlaneManager
from sagellm.control_plane.relay import Outcome
from sagellm.control_plane.routing.decision import NoEngine
from sagellm.control_plane.types import RequestMetadata, RequestType
from sagellm.control_plane.waiting import Pace, comeback
from sagellm.engine.base import EngineState
from sagellm.engine.engine import SageLLMEngine
from sagellm.engine.stats import EngineLoad
from sagellm.errors import QueueFull

PROMPTS = [
    f"Once upon a time there was a {word}"
    for word in ("dog", "cat", "boy", "girl", "bird", "fish", "tree", "king")
]
STREAMS = 32
TOKENS = 96


async def text_of(client, number, **more):
    chunks = client.generate_stream(
        PROMPTS[number % len(PROMPTS)], max_tokens=TOKENS, ignore_eos=True, temperature=0,
        stream_options={"include_usage": True}, **more,
    )  # fmt: skip
    text, usage, reasons = "", None, []
    async for chunk in chunks:
        for choice in chunk["choices"]:
            assert "token_ids" not in choice, "the client did not ask for them"
            text += choice["text"]
            reasons.append(choice["finish_reason"])
        usage = chunk.get("usage") or usage
    assert reasons[-1] == "length" and reasons.count("length") == 1
    assert usage["completion_tokens"] == TOKENS
    return text


def test_streams_of_a_killed_engine_go_on_in_another(tmp_path):
    """32 streams over two servers, one of which gets kill -9: all end with the text of an undisturbed engine."""
    with SageLLMEngine("builtin", dtype="float32", max_length=256) as alone:
        from sagellm.batch import SamplingParams

        how = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        expected = [result.text for result in alone.generate(PROMPTS, how)]

    async def main():
        manager = ControlPlaneManager(probe_every=0.1, strategy="round_robin", logs=tmp_path)
        options = {"extra": ("--dtype", "float32", "--max-length", "256", "--core", "inline")}
        async with await AsyncInferenceClient.create(manager=manager, timeout=300) as client:
            infos = [await manager.request_engine_startup("builtin", **options) for _ in range(2)]
            for info in infos:
                await manager.wait_until_ready(info.engine_id, 300)
            tasks = [asyncio.create_task(text_of(client, i)) for i in range(STREAMS)]
            victim = manager.members[infos[0].engine_id]
            while victim.info.active_requests < STREAMS // 2:
                await asyncio.sleep(0.01)
            while manager.fleet.columns.ahead.any():  # prompts that have no token yet
                await asyncio.sleep(0.01)
            os.killpg(victim.info.metadata["pid"], signal.SIGKILL)
            texts = await asyncio.gather(*tasks)
            assert texts == [expected[i % len(PROMPTS)] for i in range(STREAMS)]
            assert manager.outcomes[infos[0].engine_id, "failed"] > 0
            while manager.get_engine_state(infos[0].engine_id) is not EngineState.ERROR:
                await asyncio.sleep(0.05)

    run(main(), 600)


def chunk(text, reason=None):
    choice = {"index": 0, "text": text, "finish_reason": reason}
    return f'data: {{"id":"x","object":"text_completion","created":1,"model":"m","choices":[{_json(choice)}]}}\n\n'


def _json(value):
    import json

    return json.dumps(value)


class Counting:
    """Requests for output that an application has, until they are answered to the end."""

    here: ClassVar[list] = []

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["path"] != "/v1/completions":
            return await self.app(scope, receive, send)
        self.here.append(scope)
        try:
            await self.app(scope, receive, send)
        finally:
            self.here.remove(scope)


def engine_that(answers, counts=None):
    """An engine's server whose completions are what `answers(body)` gives.

    Where there is `counts()`, it tells like one of ours how many requests it has, and so many tokens.
    """

    async def completions(request):
        return await answers(await request.json())

    async def info(request):
        return JSONResponse({"engine_kind": "sagellm"})

    async def metrics(request):
        told = {
            "running_sequences": len(Counting.here),
            "waiting_sequences": 0,
            "generated_tokens_total": counts(),
        }
        return PlainTextResponse("".join(f"sagellm_{name} {value}\n" for name, value in told.items()))

    telling = [Route("/info", info), Route("/metrics", metrics)] if counts else []

    async def models(request):
        return JSONResponse({"data": [{"id": "m", "max_model_len": 100}]})

    async def health(request):
        return JSONResponse({})

    return Starlette(
        routes=[
            *telling,
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/completions", completions, methods=["POST"]),
        ],
        middleware=[Middleware(Counting)] if counts else [],
    )


async def well(body):
    if not body.get("stream"):
        return JSONResponse({"choices": [{"index": 0, "text": "well", "finish_reason": "stop"}], "usage": {}})

    async def pieces():
        yield chunk("well", "stop")
        yield "data: [DONE]\n\n"

    return StreamingResponse(pieces(), media_type="text/event-stream")


async def broken(body):
    return JSONResponse({"error": {"message": "boom"}}, 500)


async def busy(body):
    return JSONResponse({"error": {"message": "full"}}, 429, {"Retry-After": "7"})


async def silent(body):
    async def pieces():
        if body.get("stream"):
            yield ": nothing yet\n\n"
        await asyncio.sleep(30)

    return StreamingResponse(pieces(), media_type="text/event-stream")


async def half(body):
    async def pieces():
        yield chunk("half ")
        raise ConnectionResetError

    return StreamingResponse(pieces(), media_type="text/event-stream")


async def with_engines(answers, use, **settings):
    """A manager over servers that answer in these ways, or are given whole, in this order."""
    async with asyncio.timeout(60):
        manager = ControlPlaneManager(probe_every=0.05, strategy="round_robin", **settings)
        await manager.start()
        from contextlib import AsyncExitStack

        async with AsyncExitStack() as stack:
            for number, how in enumerate(answers):
                app = how if isinstance(how, Starlette) else engine_that(how)
                port = await stack.enter_async_context(served(app))
                manager.register_engine(f"e{number}", "m", "127.0.0.1", port)
            for name in list(manager.members):
                await manager.wait_until_ready(name)
            found = await use(manager)
            await manager.stop()
            return found


def call(stream=False, **more):
    metadata = RequestMetadata(request_type=RequestType.LLM_GENERATE, model_name="m", max_tokens=4, **more)
    return Call("/v1/completions", {"model": "m", "prompt": "x", "stream": stream}, metadata)


async def answer(manager, stream=False, **more):
    reply = await manager.submit(call(stream, **more))
    return reply.status, (await reply.read()).decode(), dict(reply.headers)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", [broken, busy])
def test_a_request_without_output_goes_elsewhere(how, stream):
    async def use(manager):
        return [await answer(manager, stream, preferred_instance_id="e0") for _ in range(2)]

    for status, text, headers in asyncio.run(with_engines([how, well], use)):
        assert (status, headers["x-sagellm-engine"]) == (200, "e1") and "well" in text


def test_a_stream_that_says_nothing_goes_elsewhere():
    async def use(manager):
        return [await answer(manager, True, preferred_instance_id="e0") for _ in range(2)]

    for status, text, headers in asyncio.run(with_engines([silent, well], use, stall=1.0)):
        assert (status, headers["x-sagellm-engine"]) == (200, "e1") and "well" in text


async def never(body):
    """Not even the head of an answer."""
    await asyncio.sleep(30)


@pytest.mark.parametrize("how", [silent, never])
def test_a_whole_answer_of_an_engine_that_counts_no_token_any_more_goes_elsewhere(how):
    async def use(manager):
        found = await answer(manager, preferred_instance_id="e0")
        assert manager.outcomes == {("e0", "failed"): 1, ("e1", "answered"): 1}
        if how is silent:  # which ends when its client goes: the engine has nothing to do, and is well again
            await manager.wait_until_ready("e0", 20)
        else:
            (engine, _) = manager.get_cluster_status()["engines"]
            assert engine["state"] == "error" and "counted no token for" in engine["detail"]
        return found

    stuck = engine_that(how, lambda: 7)
    status, text, headers = asyncio.run(with_engines([stuck, well], use, stall=1.0))
    assert (status, headers["x-sagellm-engine"]) == (200, "e1") and "well" in text


def test_a_whole_answer_may_take_its_time_while_its_engine_counts_tokens():
    tokens = itertools.count()

    async def slow(body):
        while next(tokens) < 40:  # with every look at the engine's counts there are more
            await asyncio.sleep(0.02)
        return await well(body)

    async def use(manager):
        return await answer(manager, preferred_instance_id="e0")

    steady = engine_that(slow, lambda: next(tokens))
    status, _, headers = asyncio.run(with_engines([steady, well], use, stall=0.3))
    assert (status, headers["x-sagellm-engine"]) == (200, "e0")


def test_an_engine_object_that_does_not_tell_any_more_is_lost_until_it_does(monkeypatch):
    """As where its core hangs. It is asked once, however often it is probed meanwhile."""

    class Hanging(Echo):
        go_on, asked = threading.Event(), 0

        def stats(self):
            self.asked += 1
            assert self.go_on.wait(60)
            return super().stats()

    async def main():
        clock, engine = Clock(), Hanging()
        manager = ControlPlaneManager(clock=clock, stall=60)
        await engine.start()
        manager.register_engine("e0", engine)
        member = manager.members["e0"]
        engine.go_on.set()
        await manager.watch.probe(member)
        monkeypatch.setattr(watch, "PROBE_SECONDS", 0.02)
        one = call()
        manager.sent(member, one)
        engine.go_on.clear()
        states = []
        for _ in range(5):
            await manager.watch.probe(member)
            states.append(member.info.state)
            clock.now += 25
        assert states == [EngineState.READY] * 3 + [EngineState.ERROR] * 2
        assert member.lost.is_set() and engine.asked == 2
        manager.ended(member, one, Outcome.FAILED, 0, None)
        await manager.watch.probe(member)
        assert member.info.state is EngineState.ERROR, "also without the request"
        engine.generated += 1
        engine.go_on.set()
        await member.telling
        await manager.watch.probe(member)
        assert member.info.state is EngineState.READY and not member.lost.is_set()

    run(main())


def test_progress_is_judged_of_what_an_engine_tells():
    """It stands still from when it has requests and counts nothing; where it is silent, those sent there count."""

    def after(*said, requests=1):
        progress = Progress()
        return [progress.still(load, requests, 10.0 * at) for at, load in enumerate(said)]

    def load(running, generated, **more):
        return EngineLoad(running=running, waiting=0, generated=generated, **more)

    assert after(load(1, 5), load(1, 5), load(1, 5), load(1, 6)) == [0, 10, 20, 0]
    assert after(load(0, 5), load(1, 5), load(1, 5)) == [0, 0, 10], "its request may have come just now"
    assert after(load(0, 5), load(0, 5), load(0, 5)) == [0, 0, 0], "it has nothing to do"
    assert after(load(1, 5, kv_use=0.1), load(1, 5, kv_use=0.2)) == [0, 0], "a long prompt is being computed"
    assert after(load(1, 5), None, None) == [0, 10, 20], "it does not answer any more"
    assert after(load(1, 5), None, None, requests=0) == [0, 10, 20], "and what it had was taken away"
    assert after(load(0, 5), None, None, requests=0) == [0, 0, 0]
    assert after(EngineLoad(running=1), EngineLoad(running=1)) == [0, 0], "it does not tell what it counts"
    assert after(None, None) == [0, 0]


def test_the_last_refusal_is_the_answer_with_its_retry_after():
    async def use(manager):
        return await answer(manager)

    status, text, headers = asyncio.run(with_engines([busy, busy], use))
    assert (status, headers["retry-after"]) == (429, "7") and "full" in text


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def one_at_a_time(clock, names=("e0",), **settings):
    """A manager on this clock with engines that take one request each; nobody is there, and nothing is probed."""
    manager = ControlPlaneManager(clock=clock, max_concurrent=1, **settings)
    for name in names:
        manager.register_engine(name, "m", "127.0.0.1", 9)
        manager.watch.enter(manager.members[name], EngineState.READY)
    return manager


async def refused_after(manager):
    """Seconds after which a request that gets no engine is to come again."""
    body = {"model": "m", "prompt": "x"}
    reply = await AppEndpoint(make_app(manager)).send("POST", "/v1/completions", body)
    assert reply.status in (429, 503)
    await reply.aclose()
    return int(reply.headers["retry-after"])


def test_a_refused_client_is_told_when_the_queue_will_have_gone():
    """As many as wait, at the pace of the answers of the last minutes; busy time alone counts."""

    async def main():
        clock = Clock()
        manager = one_at_a_time(clock, queue=4)
        member = manager.members["e0"]
        for _ in range(5):  # one answer in 3 s, with rests between them
            one = call()
            manager.sent(member, one)
            clock.now += 3
            manager.ended(member, one, Outcome.ANSWERED, 4, None)
            clock.now += 100
        manager.sent(member, call())
        clock.now += 3
        waiting = [asyncio.create_task(manager.submit(call())) for _ in range(4)]
        await asyncio.sleep(0)
        found = [await refused_after(manager) for _ in range(8)]
        predicted = 5 * (18 / 5)  # four wait before it; five answers in 18 s, as the sixth takes 3 s already
        assert set(found) == {18, 19, 20, 21, 22}, "clients that were refused together do not come together"
        assert min(found) == predicted
        urgent = call(priority="critical")
        assert manager.retry_after(urgent) < 8, "it goes before those who wait"
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    run(main())


def test_a_refused_client_is_told_what_all_engines_together_need():
    async def main():
        clock = Clock()
        manager = one_at_a_time(clock, ("e0", "e1"), queue=0)
        for member in manager.members.values():
            manager.sent(member, call())
        clock.now += 20
        assert await refused_after(manager) == 10, "none has answered yet: both are taken to answer now"
        clock.now += 10_000
        assert 48 <= await refused_after(manager) <= 60
        manager.watch.enter(manager.members["e1"], EngineState.ERROR)
        assert 48 <= await refused_after(manager) <= 60

    run(main())


def test_the_pause_of_an_engine_that_left_is_not_that_of_the_next_with_its_id():
    async def main():
        manager = one_at_a_time(Clock())
        old = manager.members["e0"]
        requests = [call() for _ in range(FAILURES)]
        for one in requests:
            manager.sent(old, one)
        manager.unregister_engine("e0")
        manager.register_engine("e0", "m", "127.0.0.1", 9)
        manager.watch.enter(manager.members["e0"], EngineState.READY)
        for one in requests:
            manager.ended(old, one, Outcome.FAILED, 0, None)
        assert manager.router.choose(call().ask).chosen == "e0"

    run(main())


def test_where_no_engine_takes_requests_the_next_try_of_one_that_failed_counts():
    async def main():
        clock = Clock()
        manager = one_at_a_time(clock, probe_every=2.0)
        member = manager.members["e0"]
        for _ in range(FAILURES + 4):
            one = call()
            manager.sent(member, one)
            manager.ended(member, one, Outcome.FAILED, 0, None)
        assert 16 <= await refused_after(manager) <= 20
        clock.now += 10
        assert 6 <= await refused_after(manager) <= 8
        manager.watch.enter(member, EngineState.STARTING)
        member.breaker = Breaker()
        assert 2 <= await refused_after(manager) <= 3, "the next probe"

    run(main())


def test_times_to_come_again_are_bounded_and_differ():
    assert {comeback(0.001, n) for n in range(10)} == {1, 2}
    assert {comeback(1e9, n) for n in range(100)} == set(range(48, 61))
    assert [comeback(20, n) for n in range(7)] == [20, 21, 22, 23, 24, 25, 20]


def test_the_pace_of_an_engine_is_that_of_its_last_answers():
    pace = Pace()
    assert pace.rate(5) == float("inf")
    pace.begins(0)
    for second in range(1, 100):
        pace.answered(second)
    assert pace.rate(99) == 1
    for half in range(1, 100):
        pace.answered(99 + half / 2)
    assert pace.rate(99 + 99 / 2) == 2


def test_a_client_that_has_no_time_to_come_again_hears_why_at_once():
    seen = []

    async def counted(request):
        seen.append(1)
        return await busy(request)

    async def use(manager):
        async with await AsyncInferenceClient.create(manager=manager, timeout=5) as client:
            with pytest.raises(QueueFull, match="full"):
                await client.generate("x", model="m")

    asyncio.run(with_engines([counted], use, attempts=1))
    assert len(seen) == 1


def test_a_stream_that_cannot_go_on_ends_with_an_error_and_not_with_an_end():
    async def use(manager):
        return await answer(manager, True, preferred_instance_id="e0")

    status, text, _ = asyncio.run(with_engines([half, well], use))
    assert status == 200 and "half " in text and "engine_lost" in text
    assert "well" not in text and "[DONE]" not in text, "its tokens are not known, so no other can go on"


def test_an_engine_that_fails_again_and_again_is_left_alone():
    seen = []

    async def counted(body):
        seen.append(1)
        return await broken(body)

    async def use(manager):
        for _ in range(20):
            assert (await answer(manager))[0] == 200
        return manager.fleet.row("e0")

    asyncio.run(with_engines([counted, well], use, clock=Clock()))
    assert len(seen) == FAILURES


def test_retries_are_few_beside_requests():
    """Whatever fails, each request adds a fifth of a retry, and ten are in hand."""
    seen = []

    async def counted(body):
        seen.append(1)
        return await busy(body)

    async def use(manager):
        for _ in range(100):
            await answer(manager)

    asyncio.run(with_engines([counted, counted, counted], use))
    assert 100 < len(seen) <= 100 + 10 + 0.2 * 100


def test_a_breaker_lets_one_try_after_its_pause():
    breaker = Breaker()
    for _ in range(FAILURES):
        assert breaker.allows(0)
        pause = breaker.failed(0)
    assert pause == 1 and not breaker.allows(0.5) and breaker.allows(1)
    breaker.sent()
    assert not breaker.allows(1), "one alone tries"
    assert breaker.failed(1) == 2 and not breaker.allows(2.9)
    breaker.sent()
    breaker.succeeded()
    assert breaker.allows(0)


def test_a_budget_of_retries_is_earned():
    budget = RetryBudget(saved=1)
    assert budget.take() and not budget.take()
    for _ in range(5):
        budget.earn()
    assert budget.take() and not budget.take()


def test_after_the_pause_one_request_tries_and_the_engine_comes_back():
    """Also when the first that tries is refused, which says nothing of the engine's health."""
    answers, clock = [broken] * FAILURES + [busy, well, well], Clock()

    async def recovering(body):
        return await answers.pop(0)(body) if answers else await well(body)

    async def use(manager):
        for _ in range(FAILURES):
            await answer(manager)
        assert (await answer_or_refusal(manager)) == "not_accepting"
        clock.now += FIRST_PAUSE
        await manager.watch.probe(manager.members["e0"])
        assert (await answer(manager))[0] == 429
        await manager.watch.probe(manager.members["e0"])
        return [(await answer(manager))[0] for _ in range(3)]

    async def answer_or_refusal(manager):
        try:
            return await answer(manager)
        except NoEngine as error:
            return error.kind

    assert asyncio.run(with_engines([recovering], use, attempts=1, clock=clock)) == [200, 200, 200]


async def garbled(body):
    async def pieces():
        yield "data: {not json\n\n"

    return StreamingResponse(pieces(), media_type="text/event-stream")


def test_an_engine_that_talks_nonsense_is_taken_for_lost():
    async def use(manager):
        return await answer(manager, True, preferred_instance_id="e0")

    status, text, headers = asyncio.run(with_engines([garbled, well], use))
    assert (status, headers["x-sagellm-engine"]) == (200, "e1") and "well" in text
