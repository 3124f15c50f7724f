"""Biases, least lengths, logprobs of prompts and samples mean what they mean in transformers and the OpenAI API."""

import pytest
import torch
from attrs import evolve
from checkpoints import continue_greedily, load_oracle, make_core, random_tokens, serve, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.batch import Request, SamplingParams
from sagellm.errors import UserError

pytest_plugins = ["checkpoints"]

PROMPTS = [random_tokens(40, 1), random_tokens(40, 1)[:20] + random_tokens(9, 2), random_tokens(3, 3)]
HOW = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("Qwen3ForCausalLM", eos_token_id=7)


@pytest.fixture(scope="module")
def core(folder):
    return make_core(folder)


def biases():
    return st.dictionaries(
        st.integers(0, 299), st.sampled_from([-100, -5.5, 2.25, 30]), min_size=1, max_size=6
    )


@settings(max_examples=25)
@given(bias=biases(), penalty=st.sampled_from([1.0, 1.3]))
def test_logit_bias_is_that_of_transformers_and_of_its_own_row(folder, core, bias, penalty):
    how = SamplingParams(max_tokens=6, logit_bias=bias, repetition_penalty=penalty)
    plain = evolve(HOW, max_tokens=6)
    got = tokens_of(serve(core, PROMPTS, how, plain, how))
    for prompt, tokens, biased in zip(PROMPTS, got, (True, False, True)):
        extra = {"sequence_bias": {(t,): float(b) for t, b in bias.items()}} if biased else {}
        extra |= {"repetition_penalty": penalty} if biased and penalty != 1.0 else {}
        assert tokens == continue_greedily(folder, prompt, 6, **extra)[0]


def test_json_makes_texts_of_the_keys_of_a_bias():
    assert SamplingParams(logit_bias={"5": 1, 6: -2.0}).logit_bias == ((5, 1), (6, -2.0))


@pytest.mark.parametrize("least", [0, 1, 5, 12])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_tokens_cannot_come_before_the_least_length(core, least, temperature):
    """Both end tokens are made all but certain; each is held back until it may come."""
    for end, how in ((7, {}), (9, {"stop_token_ids": [9]})):
        sampling = SamplingParams(
            max_tokens=12, min_tokens=least, logit_bias={end: 100}, temperature=temperature, seed=1, **how
        )
        (tokens,) = tokens_of(serve(core, PROMPTS[:1], sampling))
        assert tokens.index(end) == max(least, 0) if least < 12 else end not in tokens
        assert len(tokens) == min(least + 1, 12)


@pytest.mark.parametrize(
    "setting", [{}, {"max_batched_tokens": 7}, {"pipeline": ""}, {"block_size": 4}], ids=str
)
def test_logprobs_of_prompts_are_those_of_transformers(folder, setting):
    """In chunks, beside prompts that begin alike, and when the prompt is cached."""
    core = make_core(folder, **setting)
    serve(core, [PROMPTS[0]], HOW)
    how = evolve(HOW, prompt_logprobs=3)
    found = {}
    for i, prompt in enumerate([PROMPTS[0], *PROMPTS]):
        core.submit(Request(str(i), prompt, how if i else HOW))
    number = dict(core.scheduler.numbers)
    while core.busy:
        for key, told in core.advance().prompt_logprobs.items():
            found.setdefault(key, []).extend(told)
    assert len(found) == 3
    for i, prompt in enumerate(PROMPTS, 1):
        with torch.inference_mode():
            scores = load_oracle(folder)(torch.tensor([prompt])).logits[0].log_softmax(-1)
        told = found[number[str(i)]]
        assert [position for position, _, _ in told] == list(range(1, len(prompt)))
        for position, logprob, top in told:
            row = scores[position - 1]
            assert logprob == pytest.approx(float(row[prompt[position]]), abs=1e-4)
            assert [value for _, value in top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_each_row_gets_as_many_likeliest_tokens_as_it_asked_for(core):
    hows = [evolve(HOW, logprobs=2), HOW, evolve(HOW, logprobs=0)]
    two, none, chosen = serve(core, PROMPTS, *hows)
    assert {len(event.top) for event in two} == {2} and {len(event.top) for event in chosen} == {0}
    assert all(event.logprob is None for event in none) and all(event.logprob is not None for event in chosen)
    assert all(event.top[0] == (event.token, event.logprob) for event in two), "greedy takes the likeliest"


def test_samples_of_a_request_share_its_prompt(core):
    prompt = random_tokens(37, 11)
    before = core.counters.forwarded, core.kv.counts.copied
    how = SamplingParams(max_tokens=8, temperature=1.3, seed=5, n=4, ignore_eos=True)

    def ask():
        (events,) = serve(core, [prompt], how)
        return [[e.token for e in events if e.sample == sample] for sample in range(4)]

    samples = ask()
    assert [len(tokens) for tokens in samples] == [8] * 4 and len(set(map(tuple, samples))) == 4
    assert core.counters.forwarded - before[0] == 37 + 7 + 1 + 3 * 7, "the last prompt token again, once"
    assert core.kv.counts.copied - before[1] == 3, "the prompt ends inside a block; the last holder keeps it"
    assert ask() == samples
    (alone,) = tokens_of(serve(core, [prompt], evolve(how, n=1)))
    assert alone == samples[0]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"n": 0}, "n is 0; accepted: a whole number of at least 1 and at most 128"),
        ({"min_tokens": 200}, "min_tokens is 200; accepted: a whole number of at least 0 and at most 128"),
        ({"logit_bias": {1: 101}}, "logit_bias of token 1 is 101; accepted: -100 to 100"),
        ({"logit_bias": {-1: 1}}, "logit_bias has token -1; accepted: token ids"),
        ({"logit_bias": [3]}, "logit_bias is [3]; accepted: {token id: bias}"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5; accepted: a list of token ids"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids has 1.5; accepted: token ids"),
        (
            {"prompt_logprobs": 21},
            "prompt_logprobs is 21; accepted: a whole number of at least 0 and at most 20",
        ),
    ],
)
def test_parameters_out_of_range_are_one_line(how, message):
    with pytest.raises(UserError) as error:
        SamplingParams(**how)
    assert str(error.value) == message


@pytest.mark.parametrize("how", [{"stop_token_ids": [300]}, {"logit_bias": {300: 1}}], ids=str)
def test_tokens_outside_the_vocabulary_are_refused_at_submission(core, how):
    with pytest.raises(UserError, match=r"has token 300; accepted: 0 to 299$"):
        core.submit(Request("new", [1], SamplingParams(**how)))
    assert not core.busy
