"""Sampling keeps the tokens transformers keeps, draws them as often as their probabilities say, and repeats itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from sagellm.backends import sampling
from sagellm.random import philox4x32, uniform

HALF_PRECISION_TIES = [torch.float32, torch.bfloat16]
"""Models give bfloat16 logits, where equal ones are common; they come to the sampler widened to float32."""


def random_logits(
    seed: int, rows: int, vocabulary: int, dtype=torch.float32, spread: float = 3.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * spread
    return logits.to(dtype).float()


def per_row(logits: torch.Tensor, values: list[float], processor) -> torch.Tensor:
    """transformers' processor, row by row, each with its own value."""
    return torch.cat([processor(value)(None, row[None]) for value, row in zip(values, logits, strict=True)])


# Philox and uniform numbers


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_words_of_random123(counter, key, words):
    def column(text):
        return np.array([[int(word, 16)] for word in text.split()], dtype=np.uint64)

    assert np.array_equal(philox4x32(column(counter), column(key)), column(words))


def test_uniform_numbers_fill_the_unit_interval_evenly():
    count, bins = 200_000, 100
    seed = np.arange(count, dtype=np.uint64) % 4
    numbers = uniform(seed, np.arange(count) // 4, np.zeros(count, dtype=np.int64))
    assert numbers.dtype == np.float64 and numbers.min() >= 0 and numbers.max() < 1
    observed = np.histogram(numbers, bins=bins, range=(0, 1))[0]
    assert chi_square(observed, np.full(bins, count / bins)) < chi_square_bound(bins - 1)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / math.sqrt(count)


def test_a_number_depends_on_seed_position_and_sample_alone():
    seed = np.array([7, 7, 8, 7, 7], dtype=np.uint64)
    position = np.array([3, 4, 3, 3, 3 + 2**32])
    sample = np.array([0, 0, 0, 1, 0])
    together = uniform(seed, position, sample)
    alone = [uniform(seed[i : i + 1], position[i : i + 1], sample[i : i + 1])[0] for i in range(5)]
    assert together.tolist() == alone
    assert len(set(alone)) == 5
    assert not np.intersect1d(together, uniform(seed, position, sample, stream=1)).size


# filters against transformers


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(1, 200),
    dtype=st.sampled_from(HALF_PRECISION_TIES),
    rows=st.lists(
        st.tuples(
            st.floats(0.05, 3.0),
            st.integers(0, 250),
            st.one_of(st.just(1.0), st.floats(0.01, 1.0), st.sampled_from([0.1, 0.5, 0.9])),
            st.floats(0.0, 1.0),
            st.floats(0.2, 3.0),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_all_filters_composed_equal_generate_of_transformers(seed, vocabulary, dtype, rows):
    logits = random_logits(seed, len(rows), vocabulary, dtype)
    tokens = torch.randint(0, vocabulary, (len(rows), 12), generator=torch.Generator().manual_seed(seed))
    lengths = torch.arange(len(rows)) + 3
    temperature, k, p, minimum, repetition = (torch.tensor(column) for column in zip(*rows, strict=True))
    p = torch.tensor([row[2] for row in rows], dtype=torch.float64)
    zeros = torch.zeros(len(rows))

    ours = sampling.penalize(logits, tokens, lengths - 2, lengths, repetition, zeros, zeros)
    ours = sampling.temperature_scale(ours, temperature)
    ours = sampling.min_p(sampling.top_p(sampling.top_k(ours, k), p), minimum)

    for i, row in enumerate(rows):
        # the order and the conditions of GenerationMixin._get_logits_processor
        steps = [hf.RepetitionPenaltyLogitsProcessor(row[4]), hf.TemperatureLogitsWarper(row[0])]
        steps += [hf.TopKLogitsWarper(row[1])] if row[1] else []
        steps += [hf.TopPLogitsWarper(row[2])] if row[2] < 1 else []
        theirs = hf.LogitsProcessorList([*steps, hf.MinPLogitsWarper(row[3])])(
            tokens[i : i + 1, : lengths[i]], logits[i : i + 1]
        )
        mine = ours[i : i + 1]
        if dtype == torch.bfloat16:  # which of equal logits stay is chance in transformers (an unstable sort)
            mine, theirs = mine.sort(-1).values, theirs.sort(-1).values
        assert torch.equal(mine, theirs)
        assert torch.equal(mine.softmax(-1), theirs.softmax(-1))


@pytest.mark.parametrize("dtype", HALF_PRECISION_TIES)
def test_each_filter_equals_its_transformers_warper_on_a_large_vocabulary(dtype):
    logits = random_logits(1, 6, 32_000, dtype)
    temperatures, ks = [0.1, 0.5, 0.7, 1.0, 1.3, 2.0], [1, 5, 50, 1000, 31_999, 99_999]
    ps, mins = [0.001, 0.1, 0.5, 0.9, 0.95, 0.999], [0.0, 0.01, 0.05, 0.3, 0.9, 1.0]
    pairs = [
        (
            sampling.temperature_scale(logits, torch.tensor(temperatures)),
            temperatures,
            hf.TemperatureLogitsWarper,
        ),
        (sampling.top_k(logits, torch.tensor(ks)), ks, hf.TopKLogitsWarper),
        (sampling.top_p(logits, torch.tensor(ps, dtype=torch.float64)), ps, hf.TopPLogitsWarper),
        (sampling.min_p(logits, torch.tensor(mins)), mins, hf.MinPLogitsWarper),
    ]
    for ours, values, warper in pairs:
        assert torch.equal(ours, per_row(logits, values, warper)), warper.__name__


def test_top_p_after_top_k_equals_transformers():
    logits = sampling.top_k(random_logits(2, 6, 32_000), torch.tensor([1, 2, 20, 50, 200, 500]))
    ps = [0.5, 0.3, 0.8, 0.95, 0.9, 0.99]
    ours = sampling.top_p(logits, torch.tensor(ps, dtype=torch.float64))
    assert torch.equal(ours, per_row(logits, ps, hf.TopPLogitsWarper))


def test_top_p_after_top_k_keeps_as_many_of_equal_logits_as_transformers():
    logits = sampling.top_k(
        random_logits(2, 6, 32_000, torch.bfloat16), torch.tensor([1, 2, 20, 50, 200, 500])
    )
    ps = [0.5, 0.3, 0.8, 0.95, 0.9, 0.99]
    ours = sampling.top_p(logits, torch.tensor(ps, dtype=torch.float64))
    theirs = per_row(logits, ps, hf.TopPLogitsWarper)
    assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)


def test_rows_that_ask_for_no_filter_stay_as_they_are():
    logits = random_logits(3, 3, 500, spread=60.0)
    zero, one = torch.zeros(3), torch.ones(3)
    assert torch.equal(sampling.temperature_scale(logits, zero), logits)
    assert torch.equal(sampling.top_k(logits, torch.zeros(3, dtype=torch.int64)), logits)
    assert torch.equal(sampling.top_p(logits, one), logits)
    assert torch.equal(sampling.min_p(logits, zero), logits)
    tokens, length = torch.zeros(3, 4, dtype=torch.int64), torch.full((3,), 4)
    assert torch.equal(sampling.penalize(logits, tokens, length, length, one, zero, zero), logits)


def test_filters_leave_their_input_alone():
    logits = random_logits(4, 2, 50)
    before = logits.clone()
    half = torch.full((2,), 0.5)
    sampling.penalize(logits, torch.zeros(2, 3, dtype=torch.int64), half, half * 6, half, half, half)
    for kernel in (sampling.temperature_scale, sampling.top_p, sampling.min_p):
        kernel(logits, half)
    sampling.top_k(logits, torch.tensor([3, 0]))
    sampling.draw(logits, half, torch.tensor([True, False]))
    assert torch.equal(logits, before)


def test_presence_and_frequency_count_output_tokens_only():
    logits = torch.zeros(2, 6)
    tokens = torch.tensor(
        [[1, 2, 2, 3, 3, 3], [5, 4, -100, 10**9, 0, 0]]
    )  # the second row is padded with rubbish
    out = sampling.penalize(
        logits,
        tokens,
        prompt_lengths=torch.tensor([2, 1]),
        lengths=torch.tensor([6, 2]),
        repetition=torch.ones(2),
        presence=torch.tensor([0.5, 1.0]),
        frequency=torch.tensor([0.25, -1.0]),
    )
    assert out.tolist() == [[0, 0, -0.75, -1.25, 0, 0], [0, 0, 0, 0, 0, 0]]


def test_a_tiny_temperature_draws_the_likeliest_token_and_no_nan():
    logits = random_logits(5, 4, 100, spread=50)
    scaled = sampling.temperature_scale(
        logits, torch.tensor([1e-3, 1e-10, 1e-30, 5e-324], dtype=torch.float64)
    )
    assert torch.isfinite(scaled).all()
    drawn = sampling.draw(scaled, torch.full((4,), 0.999), torch.zeros(4, dtype=torch.bool))
    assert torch.equal(drawn, logits.argmax(-1))


# draws


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def chi_square_bound(freedom: int, z: float = 4.0) -> float:
    """The critical value at z = 4 standard deviations (p = 3e-5), by Wilson and Hilferty's approximation (1931)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + z * math.sqrt(spread)) ** 3


@pytest.mark.parametrize("filtered", [False, True])
def test_draws_follow_the_probabilities(filtered):
    count, vocabulary = 40_000, 24
    logits = random_logits(6, 1, vocabulary, spread=1.0)
    if filtered:
        logits = sampling.top_k(logits, torch.tensor([10]))
    numbers = uniform(np.full(count, 11, dtype=np.uint64), np.arange(count), np.zeros(count, dtype=np.int64))
    greedy = torch.zeros(count, dtype=torch.bool)
    drawn = sampling.draw(logits.expand(count, -1), torch.from_numpy(numbers), greedy)

    probability = logits[0].double().softmax(-1).numpy()
    observed = np.bincount(drawn.numpy(), minlength=vocabulary)
    possible = probability > 0
    assert observed[~possible].sum() == 0
    statistic = chi_square(observed[possible], probability[possible] * count)
    assert statistic < chi_square_bound(int(possible.sum()) - 1)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(1, 300),
    number=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53, 1.0])),
    kept=st.integers(1, 300),
)
def test_a_masked_token_is_never_drawn(seed, vocabulary, number, kept):
    logits = sampling.top_k(random_logits(seed, 1, vocabulary, spread=30.0), torch.tensor([kept]))
    for dtype in (torch.float64, torch.float32):  # in float32 a number near 1 becomes 1
        drawn = sampling.draw(logits, torch.tensor([number], dtype=dtype), torch.tensor([False]))
        assert drawn.dtype == torch.int64
        assert logits.softmax(-1)[0, drawn] > 0


def test_a_draw_takes_the_token_whose_share_holds_the_number():
    logits = torch.tensor([[0.5, 0.0, 0.25, 0.25, 0.0]]).log().expand(5, -1)
    numbers = torch.tensor([0.0, 0.4999, 0.5, 0.75, 1.0])
    assert sampling.draw(logits, numbers, torch.zeros(5, dtype=torch.bool)).tolist() == [0, 0, 2, 3, 3]


def test_greedy_rows_take_the_argmax_beside_rows_that_draw():
    logits = random_logits(7, 64, 100)
    greedy = torch.arange(64) % 2 == 0
    drawn = sampling.draw(logits, torch.full((64,), 0.9), greedy)
    assert torch.equal(drawn[greedy], logits.argmax(-1)[greedy])
    assert not torch.equal(drawn[~greedy], logits.argmax(-1)[~greedy])


# logprobs


@pytest.mark.parametrize("top", [0, 1, 5])
def test_logprobs_are_those_of_the_raw_logits(top):
    logits = random_logits(8, 3, 50)
    tokens = torch.tensor([4, 0, 49])
    chosen, top_ids, top_values = sampling.logprobs(logits, tokens, top)
    expected = logits.log_softmax(-1)
    assert torch.equal(chosen, expected[torch.arange(3), tokens])
    assert top_ids.shape == top_values.shape == (3, top)
    assert torch.equal(top_values, expected.sort(-1, descending=True).values[:, :top])
    assert torch.equal(expected.gather(1, top_ids), top_values)
