"""A stream that was begun elsewhere goes on, wherever it was cut, as if it had never been cut."""

import asyncio
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from sagellm.batch import SamplingParams
from sagellm.engine.base import GenerateRequest
from sagellm.engine.engine import SageLLMEngine
from sagellm.errors import UserError

pytest_plugins = ["checkpoints"]

SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
DRAWN = {"temperature": 1.2, "seed": 11}
WAYS = {
    "greedy": {"ignore_eos": True},
    "drawn": {**DRAWN, "ignore_eos": True, "top_p": 0.9},
    "penalties": {**DRAWN, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    "an end token": {**DRAWN, "stop_token_ids": tuple(range(1, 40))},
    "no end before": {**DRAWN, "stop_token_ids": tuple(range(1, 200)), "min_tokens": 9},
    "stop strings": {**DRAWN, "ignore_eos": True, "stop": ("e", "的", "ab"), "min_tokens": 5},
    "a schema": {**DRAWN, "grammar": {"json": SCHEMA}},
    "a regex": {**DRAWN, "grammar": {"regex": "[a-z]{12}"}, "ignore_eos": True},
    "logprobs": {"logprobs": 2, "ignore_eos": True},
}
PROMPTS = ["The quick brown fox", "中文", "naïve café 🙂", [7] * 33]


@pytest.fixture(scope="module")
def engines(text_checkpoint):
    with (
        SageLLMEngine(str(text_checkpoint), max_sequences=4) as here,
        SageLLMEngine(str(text_checkpoint), max_sequences=4) as there,
    ):
        yield here, there


def ask(prompt, resume=(), **how):
    return GenerateRequest(
        prompt=prompt, sampling=SamplingParams(**{"max_tokens": 24, **how}), resume=tuple(resume)
    )


def goes_on(here, there, prompt, how, cut):
    """One engine tells it all, the other what follows `cut` of its tokens."""
    whole = here.stream(ask(prompt, **how))
    events = list(whole)
    tokens, told = whole.result.token_ids, "".join(event.text for event in events[cut:])
    stream = there.stream(ask(prompt, tokens[:cut], **how))
    rest = list(stream)
    assert stream.resumed + told == whole.result.text
    assert [e.index for e in rest if e.ids] == list(range(cut, len(tokens)))
    assert [e.text for e in rest if e.ids] == [e.text for e in events[cut:]]
    assert "".join(e.text for e in rest) == told
    for name in ("token_ids", "text", "finish_reason"):
        assert getattr(stream.result, name) == getattr(whole.result, name)
    assert stream.result.outputs[0].stopped_by == whole.result.outputs[0].stopped_by
    assert stream.result.logprobs == pytest.approx(whole.result.logprobs[cut:], abs=1e-4)
    assert rest[-1].finish_reason == whole.result.finish_reason
    assert stream.result.cached_tokens <= stream.result.prompt_tokens
    return whole.result


@examples(25)
@given(way=st.sampled_from(sorted(WAYS)), prompt=st.sampled_from(PROMPTS), data=st.data())
def test_a_stream_cut_anywhere_goes_on_in_another_engine(engines, way, prompt, data):
    here, there = engines
    result = here.generate([prompt], SamplingParams(max_tokens=24, **WAYS[way]))[0]
    cut = data.draw(st.integers(0, len(result.token_ids)), label="cut")
    goes_on(here, there, prompt, WAYS[way], cut)


def test_cut_inside_a_character_and_inside_a_stop_string(reciting_checkpoint):
    with SageLLMEngine(str(reciting_checkpoint)) as engine:
        prompt = engine.chat_prompt([{"role": "user", "content": "x"}])
        for how in ({"stop": ("STOP.",)}, {"stop": ("STOPPED", "é中文🙂 T")}):
            for cut in range(len(goes_on(engine, engine, prompt, how, 0).token_ids) + 1):
                goes_on(engine, engine, prompt, how, cut)
            assert cut > 8, "characters of several tokens"


def test_what_ended_with_its_last_token_ends_at_once_and_costs_no_step(engines):
    here, there = engines
    steps = there.stats().steps
    for how, reason in (
        ({"max_tokens": 5}, "length"),
        (WAYS["an end token"] | {"max_tokens": 200}, "stop"),
        (WAYS["stop strings"] | {"max_tokens": 200}, "stop"),
        (WAYS["a regex"], "stop"),
    ):
        result = here.generate(["x"], SamplingParams(**how))[0]
        (event,) = there.stream(ask("x", result.token_ids, **how))
        assert (event.ids, event.text, event.finish_reason) == ((), "", reason)
    assert there.stats().steps == steps and there.stats().running == 0


def test_the_context_is_an_end_too(text_checkpoint):
    with SageLLMEngine(str(text_checkpoint), max_length=32) as engine:
        whole = engine.generate([[5] * 20], SamplingParams(max_tokens=100, ignore_eos=True))[0]
        assert len(whole.token_ids) == 12
        how = {"max_tokens": 100, "ignore_eos": True}
        again = engine.stream(ask([5] * 20, whole.token_ids, **how)).wait()
        assert (again.finish_reason, again.text) == ("length", whole.text)
        with pytest.raises(UserError, match="prompt and resume have 33 tokens; accepted: at most 32"):
            engine.stream(ask([5] * 20, [5] * 13, **how))


def test_what_is_resumed_is_not_counted_as_made(engines):
    _, there = engines
    before = there.stats()
    there.stream(ask("once", [40] * 10, max_tokens=15, ignore_eos=True)).wait()
    after = there.stats()
    assert after.generated - before.generated == 5
    counts = {
        name: after.times[name]["count"] - before.times[name]["count"] for name in ("ttft", "itl", "tpot")
    }
    assert counts == {"ttft": 1, "itl": 4, "tpot": 1}
    assert after.times["itl"]["sum"] - before.times["itl"]["sum"] < 600, "no gap since the machine began"


def test_keys_and_values_of_a_stream_go_with_it(engines):
    here, there = engines
    whole = here.generate([[9] * 40], SamplingParams(max_tokens=40, ignore_eos=True))[0]
    request = ask([9] * 40, whole.token_ids[:30], max_tokens=40, ignore_eos=True)

    async def run():
        handle = await here.prefill(request)
        return handle, [event.ids[0] async for event in there.decode(request, handle)]

    handle, rest = asyncio.run(run())
    assert len(handle.tokens) == 64 and rest == whole.token_ids[30:]


@pytest.mark.parametrize(
    ("resume", "how", "message"),
    [
        ([-1], {}, "resume has -1; accepted: token ids"),
        ([True], {}, "resume has True; accepted: token ids"),
        ([300], {}, "token id 300 in resume; accepted: 0 to 299"),
        ([2**70], {}, "in resume; accepted: 0 to 299"),
        ([5] * 9, {"max_tokens": 8}, "resume has 9 tokens; accepted: at most max_tokens, which is 8"),
        ([5], {"n": 2}, "resume is given with n 2; accepted: with one output"),
        ([5], {"prompt_logprobs": 1}, "resume is given with prompt_logprobs"),
        ([5, 0, 5], {}, "resume goes on behind token 0, which ends it"),
        ([5, 6, 5], {"stop_token_ids": [6]}, "resume goes on behind token 6, which ends it"),
        ("The end of it", {"stop": "end"}, "resume goes on behind stop string 'end'"),
        ("The", {"grammar": {"regex": "[0-9]+"}}, "resume is not of the grammar"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(engines, resume, how, message):
    here, _ = engines
    resume = here.tokenizer.encode(resume) if isinstance(resume, str) else resume
    with pytest.raises(UserError, match=re.escape(message)):
        here.stream(ask("x", resume, **how)).wait()
    with pytest.raises(UserError, match="resume is given with pooling"):
        GenerateRequest(prompt="x", resume=(5,), pooling="mean")
