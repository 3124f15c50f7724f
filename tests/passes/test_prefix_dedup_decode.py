"""Decode rows with equal first blocks: who reads together, when it pays, and that nothing else changes."""

from functools import partial
from itertools import count

import numpy as np
import pytest
from checkpoints import make_core, random_tokens, serve, tokens_of
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from sagellm.backends.cpu import CpuBackend
from sagellm.batch import Batch, Columns, Phase, Request, SamplingParams
from sagellm.passes.cohorts import find_cohorts
from sagellm.passes.driver import StepView
from sagellm.passes.prefix_dedup import PrefixDedup, cascade_gain
from sagellm.rows import build_rows
from sagellm.runtime.executor import Executor
from sagellm.target import AttentionShape, CostModel
from sagellm.testing.requests import request_rows

pytest_plugins = ["checkpoints"]

SHAPE = AttentionShape(heads=14, kv_heads=2, head_dim=64, layers=24, dtype="float32")
FREE, COSTS = CostModel(call=0, bytes_per_second=1e15, narrow=1e-3), CostModel()
OFF = "cleanup,kernel-fusion,pack-weights"
ON = f"prefix-dedup,{OFF}"


def decoding(tables: list[list[int]], block_size: int = 4) -> Batch:
    """Rows with these full blocks, and two tokens in one more."""
    c = Columns(len(tables), 64 * block_size, block_size)
    for row, table in enumerate(tables):
        c.fill(row, Request(str(row), [0] * (len(table) * block_size + 3)), number=row)
        c.blocks[row, : len(table) + 1] = [*table, 1000 + row]
        c.context[row], c.new[row], c.owned[row] = c.length[row] - 1, 1, len(table) + 1
    return Batch(c, np.arange(len(tables)), np.zeros(0, np.int64))


def read_together(tables: list[list[int]], gain=lambda rows, tokens: float((rows - 1) * tokens)):
    batch = decoding(tables)
    found = find_cohorts(batch.columns, batch.decode, gain)
    return list(zip(found.cohort.tolist(), found.common.tolist())), found.gain


def test_the_outer_or_the_inner_beginning_whichever_saves_more():
    assert read_together([[1, 2], [3], [1, 2], [4]])[0] == [(0, 8), (-1, 0), (0, 8), (-1, 0)]
    assert (
        read_together([[1, 2, 3, 4], [1, 2, 3, 4], [1, 5, 6, 7], [1, 5, 6, 7]])[0]
        == [(0, 16)] * 2 + [(2, 16)] * 2
    )
    assert read_together([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6], [1, 2, 7]])[0] == [(0, 8)] * 4
    assert read_together([[], [1], []])[0] == [(-1, 0)] * 3


@examples(60)
@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=9), st.integers(0, 9))
def test_members_share_what_they_read_and_nothing_gains_more(paths, fixed):
    """A block's number is its path, as in the prefix index. The best of all ways is found by trying them."""
    numbers: dict[tuple, int] = {}
    tables = [
        [numbers.setdefault(tuple(path[: i + 1]), len(numbers) + 1) for i in range(len(path))]
        for path in paths
    ]

    def gain(rows: int, tokens: int) -> float:
        return (rows - 1) * tokens - fixed

    found, total = read_together(tables, gain)
    for cohort in {c for c, _ in found if c >= 0}:
        members = [row for row, (c, _) in enumerate(found) if c == cohort]
        blocks = {common // 4 for c, common in found if c == cohort}
        assert len(blocks) == 1 and len(members) > 1
        assert len({tuple(tables[row][: max(blocks)]) for row in members}) == 1
    assert total == best(tables, 0, gain)


def best(tables: list[list[int]], depth: int, gain) -> float:
    """Of the rows that are equal in the first `depth` blocks: all together, or branch by branch."""
    branches: dict[int, list] = {}
    for table in tables:
        if len(table) > depth:
            branches.setdefault(table[depth], []).append(table)
    apart = sum(best(branch, depth + 1, gain) for branch in branches.values())
    return max(apart, gain(len(tables), depth * 4) if len(tables) > 1 and depth else 0.0)


def test_a_thousand_nested_beginnings():
    _, total = read_together([list(range(1, row + 2)) for row in range(40)] * 25)
    assert total > 0


# when it pays


def decided(batch: Batch, costs: CostModel = COSTS, shape=SHAPE) -> str | None:
    batch.facts, batch.notes, batch.declines = {}, {}, {}
    PrefixDedup().decide(batch, StepView(costs, shape))
    return batch.notes.get("prefix-dedup") or batch.declines.get("prefix-dedup")


def test_long_beginnings_of_many_rows_are_read_together_and_short_ones_are_not():
    table = list(range(1, 61))
    many, few = decoding([[*table, 100 + row] for row in range(8)]), decoding([[1, 2], [1, 3]])
    note, gain = decided(many), cascade_gain(COSTS, SHAPE, 8, 240) - 24 * COSTS.call
    assert (
        note
        == f"8 of 8 decode rows read up to 240 tokens together, in 1 cohorts (predicted: {gain * 1e6:+.1f} us)"
    )
    assert many.facts == {Phase.DECODE: ("cascade",)} and set(many.columns.common) == {240}
    note, gain = decided(few), cascade_gain(COSTS, SHAPE, 2, 4) - 24 * COSTS.call
    assert note == (
        f"decode rows have up to 4 tokens of blocks in common: too few to gain (predicted: {gain * 1e6:+.1f} us)"
    )
    assert few.declines and few.facts == {} and not few.columns.common.any()


def test_a_model_whose_layers_all_have_windows_reads_each_row_alone():
    batch = decoding([[1, 2, 3, 9], [1, 2, 3, 8]])
    windows = AttentionShape(heads=2, kv_heads=1, head_dim=4, layers=0, dtype="float32")
    assert decided(batch, FREE, windows) is None and batch.facts == {}


def test_cohorts_are_kept_while_the_same_rows_decode(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "sagellm.passes.prefix_dedup.find_cohorts", lambda *given: calls.append(1) or find_cohorts(*given)
    )
    batch = decoding([[1, 2, 3], [1, 2, 4], [1, 2, 5]])
    c = batch.columns
    for _ in range(3):
        decided(batch, FREE)
        assert set(c.common) == {8}
        c.context += 1
    assert len(calls) == 1
    c.blocks[2, 1] = 77
    decided(batch, FREE)
    assert c.common.tolist() == [8, 8, 0] and len(calls) == 2
    c.number[2] += 10
    decided(batch, FREE)
    batch.decode = batch.decode[:2]
    decided(batch, FREE)
    assert len(calls) == 4 and c.common[:2].tolist() == [8, 8]


def test_a_cohort_of_which_only_some_rows_are_left_in_the_step():
    batch = decoding([[1, 2, 3], [1, 2, 4], [5, 6], [1, 2, 5], [5, 6]])
    decided(batch, FREE)
    for rows in ([0, 1, 2, 3, 4], [4, 3, 1], [2], []):
        batch.decode = np.array(rows, np.int64)
        ours, theirs = (make(batch, cascade=True) for make in (build_rows, request_rows))
        for name in ("cohort_rows", "cohort_offsets", "cohort_common"):
            assert getattr(ours, name).tolist() == getattr(theirs, name).tolist()


# through the engine


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("Qwen3ForCausalLM", max_position_embeddings=1024)


@pytest.fixture
def free(monkeypatch):
    """A device on which reading together always pays."""
    monkeypatch.setattr(CpuBackend, "costs", FREE)


RUN = Executor.run


def keeping(run, outcomes: list):
    """`Executor.run` that also puts away what comes out: (request, sample), token, logits."""

    def kept(executor, plan, batch):
        outcome, c = run(executor, plan, batch), executor.columns
        names = zip(c.number[outcome.rows].tolist(), c.sample[outcome.rows].tolist())
        outcomes.extend(zip(names, outcome.tokens.tolist(), outcome.logits))
        return outcome

    return kept


def told(core) -> list[tuple[str, ...]]:
    """The kinds of rows of the steps so far."""
    return [kinds for kinds, _ in core.compiler._models]


def test_sixteen_prompts_with_a_common_beginning_are_computed_once(folder):
    core = make_core(folder, max_sequences=16, max_length=1024)
    common = random_tokens(512, 1)
    prompts = [common + random_tokens(32, seed) for seed in range(2, 18)]
    made = tokens_of(serve(core, prompts, SamplingParams(max_tokens=6)))
    assert core.counters.forwarded == 512 + 16 * 32 + 16 * 5
    assert ("decode", "cascade") in told(core), "the costs of this backend say that it pays"
    off = make_core(folder, OFF, max_sequences=16, max_length=1024)
    assert tokens_of(serve(off, prompts, SamplingParams(max_tokens=6))) == made


@pytest.mark.parametrize("stock", [False, True], ids=["native", "stock torch"])
@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "LlamaForCausalLM", "window"])
def test_logits_are_those_of_rows_that_read_alone(checkpoint, monkeypatch, architecture, stock):
    """Samples of a prompt, prompts that come while others decode, and layers with a window among others."""
    from sagellm.backends.cpu import native

    if stock:
        monkeypatch.setattr(native, "unavailable", lambda: "no C compiler")
    name, fields = architecture, {}
    if architecture == "window":
        name, fields = (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
        )
    folder = checkpoint(name, **fields)
    common = random_tokens(50, 1)
    prompts = [common + random_tokens(n, n) for n in (3, 20, 1, 40)] + [random_tokens(20, 9)]
    runs = []
    for costs in (FREE, CostModel(call=1.0)):
        monkeypatch.setattr(CpuBackend, "costs", costs)
        core, logits = make_core(folder, ON, max_length=128, max_batched_tokens=64), []
        monkeypatch.setattr(Executor, "run", keeping(RUN, logits))
        for i, prompt in enumerate(prompts):
            core.submit(Request(str(i), prompt, SamplingParams(max_tokens=12, n=2 if i == 1 else 1)))
            core.step()
        while core.busy:
            core.step()
        runs.append((told(core), logits))
        monkeypatch.setattr(Executor, "run", RUN)
    (kinds, ours), (_, theirs) = runs
    assert ("decode", "cascade") in kinds
    assert any("cascade" in words and "prefill" in words for words in kinds)
    assert not any("cascade" in words for words in runs[1][0])
    last = {}
    for outcomes in (ours, theirs):
        found = last.setdefault(id(outcomes), {})
        for name, token, logit in outcomes:
            found.setdefault(name, []).append((token, logit))
    one, other = last.values()
    assert one.keys() == other.keys()
    for row in one:
        assert [t for t, _ in one[row]] == [t for t, _ in other[row]]
        for (_, x), (_, y) in zip(one[row], other[row]):
            assert (x - y).abs().max() <= 1e-5 * y.abs().max().clamp(min=1)


def test_rows_that_are_put_back_while_others_read_together(folder, free):
    common = random_tokens(64, 1)
    prompts = [common + random_tokens(10 + seed, seed) for seed in range(2, 8)]
    how = SamplingParams(max_tokens=40)
    alone = [tokens_of(serve(make_core(folder, OFF, max_length=256), [p], how))[0] for p in prompts]
    core, made = make_core(folder, max_length=256), {str(i): [] for i in range(len(prompts))}
    for name, prompt in zip(made, prompts):
        core.submit(Request(name, prompt, how))
    for step in count():
        if step == 10:
            assert ("decode", "cascade") in told(core)
            core.scheduler.preempt(2)
            core.scheduler.preempt(0)
        for event in core.step():
            made[event.request_id].append(event.token)
        if not core.busy:
            break
    assert list(made.values()) == alone
    assert core.counters.recomputed


def test_the_gain_grows_with_rows_and_tokens_and_bandwidth_decides():
    gain = partial(cascade_gain, CostModel(), SHAPE)
    assert gain(2, 100) < gain(4, 100) < gain(4, 1000)
    assert cascade_gain(CostModel(bytes_per_second=1e13, narrow=1.0), SHAPE, 4, 100) < 0
