"""A request's tokens are drawn as its settings say, whoever shares the batch; the distribution is transformers'."""

import json
import shutil

import pytest
import torch
import transformers
from attrs import evolve
from checkpoints import continue_greedily, load_oracle, make_core, random_tokens, serve, tokens_of

from sagellm.batch import Request, SamplingParams

pytest_plugins = ["checkpoints"]

PROMPT = random_tokens(23, 1)
OTHERS = [random_tokens(1, 2), PROMPT, PROMPT[:9] + random_tokens(20, 3), random_tokens(50, 4)]
STEPS = 24
DRAWN = SamplingParams(max_tokens=STEPS, temperature=1.2, seed=7)
FULL = evolve(DRAWN, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1, frequency_penalty=0.2)


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("Qwen3ForCausalLM")


@pytest.fixture(scope="module")
def core(folder):
    return make_core(folder)


def draw(core, how, prompt=PROMPT):
    return tokens_of(serve(core, [prompt], how))[0]


# seeds


@pytest.mark.parametrize(
    "settings", [{}, {"pipeline": ""}, {"max_batched_tokens": 5}, {"block_size": 32}], ids=str
)
@pytest.mark.parametrize("how", [DRAWN, FULL], ids=["temperature", "every stage"])
def test_a_seed_draws_the_same_tokens_alone_and_among_others(folder, core, how, settings):
    """The others are greedy, or draw with other seeds and settings; two have the same prompt."""
    alone = draw(core, how)
    other = make_core(folder, **settings)
    assert draw(other, how) == alone
    hows = [
        SamplingParams(max_tokens=9),
        evolve(DRAWN, seed=8),
        SamplingParams(max_tokens=30, temperature=0.7, top_p=0.5, presence_penalty=1.0),
        how,
        SamplingParams(max_tokens=STEPS, top_k=3, temperature=2.0, seed=7),
        how,
    ]
    among = tokens_of(serve(other, [*OTHERS[:3], PROMPT, OTHERS[3], PROMPT], *hows))
    assert among[3] == among[5] == alone


def test_seeds_differ(core):
    drawn = tokens_of(serve(core, [PROMPT] * 8, *(evolve(DRAWN, seed=seed) for seed in range(8))))
    assert len({tuple(tokens) for tokens in drawn}) == 8


def test_requests_without_a_seed_differ_and_the_engine_repeats_itself(folder):
    runs = []
    for _ in range(2):
        core = make_core(folder, seed=3)
        runs.append([tokens_of(serve(core, [PROMPT] * 4, evolve(DRAWN, seed=None))) for _ in range(2)])
    assert runs[0] == runs[1]
    assert len({tuple(tokens) for run in runs[0] for tokens in run}) == 8
    other = tokens_of(serve(make_core(folder, seed=4), [PROMPT] * 4, evolve(DRAWN, seed=None)))
    assert not any(tokens in runs[0][0] for tokens in other)


# greedy


@pytest.mark.parametrize(
    "how",
    [
        SamplingParams(max_tokens=STEPS, temperature=0.0, top_k=5, top_p=0.3, min_p=0.2, seed=9),
        SamplingParams(max_tokens=STEPS, temperature=1.5, top_k=1, seed=9),
        SamplingParams(max_tokens=STEPS, temperature=1.0, top_p=1e-9, seed=9),
        SamplingParams(max_tokens=STEPS, temperature=1.0, min_p=1.0, seed=9),
        SamplingParams(max_tokens=STEPS, temperature=1e-9, seed=9),
    ],
    ids=["temperature 0", "top_k 1", "tiny top_p", "min_p 1", "tiny temperature"],
)
def test_what_leaves_one_token_is_greedy(core, how):
    greedy = draw(core, SamplingParams(max_tokens=STEPS))
    assert draw(core, how) == greedy
    mixed = tokens_of(serve(core, [PROMPT, *OTHERS, PROMPT], how, *[DRAWN] * len(OTHERS), how))
    assert mixed[0] == mixed[-1] == greedy


# penalties


@pytest.mark.parametrize("penalty", [0.7, 1.05, 1.3, 2.0])
@pytest.mark.parametrize("prompt", [PROMPT, [5] * 4 + [9] * 3, [17]], ids=["long", "repeating", "one token"])
def test_repetition_penalty_gives_the_greedy_tokens_of_transformers(core, folder, prompt, penalty):
    expected, _ = continue_greedily(folder, prompt, STEPS, repetition_penalty=penalty)
    assert draw(core, SamplingParams(max_tokens=STEPS, repetition_penalty=penalty), prompt) == expected


class OutputPenalties(transformers.LogitsProcessor):
    """The formula of OpenAI's API reference, over the output alone."""

    def __init__(self, prompt_length, presence, frequency):
        self.prompt_length, self.presence, self.frequency = prompt_length, presence, frequency

    def __call__(self, input_ids, scores):
        count = torch.bincount(input_ids[0, self.prompt_length :], minlength=scores.shape[1])
        return scores - count * self.frequency - (count > 0) * self.presence


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.8), (0.5, 0.5), (-1.0, -0.5)])
def test_presence_and_frequency_penalty_count_the_output(core, folder, presence, frequency):
    penalties = OutputPenalties(len(PROMPT), presence, frequency)
    expected, _ = continue_greedily(
        folder, PROMPT, STEPS, logits_processor=transformers.LogitsProcessorList([penalties])
    )
    how = SamplingParams(max_tokens=STEPS, presence_penalty=presence, frequency_penalty=frequency)
    assert draw(core, how) == expected
    assert expected != continue_greedily(folder, PROMPT, STEPS)[0]


def test_penalties_of_one_request_leave_the_others_as_they_are(core):
    greedy = SamplingParams(max_tokens=STEPS)
    penalized = evolve(greedy, repetition_penalty=1.5)
    mixed = tokens_of(serve(core, [PROMPT, PROMPT, PROMPT], greedy, penalized, greedy))
    assert mixed == [draw(core, greedy), draw(core, penalized), draw(core, greedy)]
    assert mixed[0] != mixed[1]


# ends


@pytest.fixture(scope="module")
def ending(folder, tmp_path_factory):
    """The same model, where two tokens end an answer: the 6th and the 10th of the greedy one."""
    tokens, _ = continue_greedily(folder, PROMPT, STEPS)
    copy = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(folder, copy)
    ends = [tokens[9], tokens[5]]
    assert not set(ends) & set(tokens[:5])
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return copy, tokens


def reasons(events):
    return [event.finish_reason for event in events]


def test_an_end_token_is_the_last_one_as_in_transformers(ending):
    folder, tokens = ending
    core = make_core(folder)
    (events,) = serve(core, [PROMPT], SamplingParams(max_tokens=STEPS))
    assert [event.token for event in events] == tokens[:6]
    assert [event.token for event in events] == continue_greedily(folder, PROMPT, STEPS)[0]
    assert reasons(events) == [None] * 5 + ["stop"]
    assert core.kv.pool.used == 0


def test_ignore_eos_goes_on_to_max_tokens(ending):
    folder, tokens = ending
    (events,) = serve(make_core(folder), [PROMPT], SamplingParams(max_tokens=STEPS, ignore_eos=True))
    assert [event.token for event in events] == tokens
    assert reasons(events) == [None] * (STEPS - 1) + ["length"]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_token_ids_stop(ending, ignore_eos):
    """With ignore_eos too: it is the end of the model's own that is ignored."""
    folder, tokens = ending
    for at in (0, 3):
        how = SamplingParams(max_tokens=STEPS, stop_token_ids=[299, tokens[at]], ignore_eos=ignore_eos)
        (events,) = serve(make_core(folder), [PROMPT], how)
        assert [event.token for event in events] == tokens[: at + 1]
        assert reasons(events) == [None] * at + ["stop"]


@pytest.mark.parametrize("count", [1, 2, 6])
def test_max_tokens_gives_length_and_an_end_token_at_the_last_place_gives_stop(ending, count):
    folder, tokens = ending
    (events,) = serve(make_core(folder), [PROMPT], SamplingParams(max_tokens=count))
    assert [event.token for event in events] == tokens[:count]
    assert events[-1].finish_reason == ("stop" if count == 6 else "length")


def test_the_end_of_one_request_leaves_the_others_running(ending):
    folder, tokens = ending
    hows = [SamplingParams(max_tokens=STEPS, ignore_eos=ignore) for ignore in (True, False, True)]
    some = serve(make_core(folder), [PROMPT] * 3, *hows)
    assert tokens_of(some) == [tokens, tokens[:6], tokens]


# distribution


def chi_square_tail(counts, expected):
    """Probability of counts as far from the expected ones as these; cells of fewer than 5 are taken together."""
    rare = expected < 5
    counts, expected = (
        torch.cat([x[~rare], x[rare].sum()[None]]) if rare.any() else x for x in (counts, expected)
    )
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), statistic / 2)


@pytest.mark.parametrize(
    ("how", "support"),
    [
        (SamplingParams(temperature=0.8), range(100, 301)),
        (SamplingParams(temperature=1.5, top_k=20), range(20, 21)),
        (SamplingParams(temperature=1.0, top_p=0.8), range(5, 200)),
        (SamplingParams(temperature=1.3, min_p=0.05), range(5, 200)),
        (SamplingParams(temperature=1.4, top_k=40, top_p=0.9, min_p=0.03), range(5, 40)),
    ],
    ids=["temperature", "top_k", "top_p", "min_p", "all together"],
)
def test_drawn_tokens_are_distributed_as_in_transformers(folder, how, support):
    """The first tokens of 6,000 identical prompts with different seeds; all are forwarded as one."""
    draws, room = 6000, 2000
    core = make_core(
        folder,
        max_sequences=room,
        max_queue=room,
        max_length=32,
        max_batched_tokens=room * len(PROMPT),
        prefix_caching=False,
    )
    counts = torch.zeros(300, dtype=torch.float64)
    for first in range(0, draws, room):
        for seed in range(first, first + room):
            core.submit(Request(str(seed), PROMPT, evolve(how, max_tokens=1, seed=seed)))
        for event in core.step():
            counts[event.token] += 1
    assert counts.sum() == draws
    assert core.counters.forwarded == len(PROMPT) * draws // room

    settings = {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p, "min_p": how.min_p}
    out = load_oracle(folder).generate(
        torch.tensor([PROMPT]),
        max_new_tokens=1,
        do_sample=True,
        output_scores=True,
        return_dict_in_generate=True,
        **settings,
    )
    probabilities = out.scores[0][0].double().softmax(-1)
    assert (probabilities > 0).sum() in support
    assert not counts[probabilities == 0].any()
    assert chi_square_tail(counts, probabilities * draws) > 0.001
    assert chi_square_tail(counts, probabilities.sqrt() / probabilities.sqrt().sum() * draws) < 1e-9


def test_draws_along_a_sequence_are_independent_of_each_other(folder):
    """Draws at one place do not tell about those at the next: the first tokens of sequences that begin alike."""
    core = make_core(folder, max_sequences=1000, max_length=32, max_batched_tokens=1000 * len(PROMPT))
    how = SamplingParams(max_tokens=2, temperature=1.0, top_k=2)
    pairs = tokens_of(serve(core, [PROMPT] * 1000, *(evolve(how, seed=seed) for seed in range(1000))))
    first = [tokens[0] for tokens in pairs]
    for token in set(first):
        score = torch.log_softmax(load_oracle(folder)(torch.tensor([[*PROMPT, token]])).logits[0, -1], -1)
        best = score.topk(2)
        share = best.values.softmax(-1)[0].item()
        after = [tokens[1] for tokens in pairs if tokens[0] == token]
        spread = (share * (1 - share) / len(after)) ** 0.5
        assert abs(after.count(int(best.indices[0])) / len(after) - share) < 4 * spread
