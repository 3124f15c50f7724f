"""The grouped lowering does what an op per request would do, at a cost that does not grow with the requests."""

from dataclasses import dataclass

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Pool, batches, every_kernel, examples, prompts, small_model

from sagellm.batch import Batch, Columns, Phase, Request, SamplingParams
from sagellm.bench.host import calls
from sagellm.ir.attrs import Table, TableAttr
from sagellm.ir.dialects import batch as b
from sagellm.ir.graph import fingerprint
from sagellm.ir.lower import lower, step_graph
from sagellm.ir.reference import evaluate_step, evaluate_weights
from sagellm.meaning.inputs import context_cache, random_tensors
from sagellm.models.decoder import build_model, build_sampler
from sagellm.passes import pipeline
from sagellm.passes.driver import Pass, Pipeline, StepView, rewrites
from sagellm.passes.prefix_dedup import PrefixDedup
from sagellm.rows import Rows, build_rows
from sagellm.testing.requests import lower_requests, request_rows

VOCAB = 7


@st.composite
def served(draw):
    """(columns, steps): requests, and how many tokens of which rows each step takes; a row decodes at its end."""
    texts = draw(prompts(draw(st.integers(1, 6)), max_length=30))
    columns = Columns(len(texts), 64, draw(st.integers(2, 16)))
    for row, text in enumerate(texts):
        columns.fill(row, Request(str(row), text), seed=row)
    chunk = st.one_of(st.just(99), st.just(0), st.sampled_from([3, 5]), st.integers(1, 12))
    together = st.integers(0, 9).map(lambda size: [size] * len(texts))
    steps = st.one_of(together, st.lists(chunk, min_size=len(texts), max_size=len(texts)))
    return columns, draw(st.lists(steps, min_size=1, max_size=6))


@examples(120)
@given(served(), st.booleans(), st.integers(0, 99), st.data())
def test_attention_finds_every_token_where_it_was_written_over_many_steps(case, dedup, seed, data):
    columns, steps = case
    pool, memory = Pool(400, seed), {}
    for sizes in steps:
        batch = next_batch(columns, sizes)
        if not len(batch.output_rows()) + len(batch.prefill):
            continue
        if dedup:
            PrefixDedup().decide(batch, StepView())
        shared = "shared" in batch.facts.get(Phase.PREFILL, ())
        pool.allocate(batch, shared)
        rows = build_rows(batch, shared=shared)
        assert_equal_columns(rows, request_rows(batch, shared=shared))
        assert rows.forwarded == len(batch.decode) + unique_prefixes(batch, shared)
        check_step(batch, rows, memory)
        commit(batch, data)


def next_batch(columns: Columns, sizes: list[int]) -> Batch:
    """Rows with one unknown key left decode, the others prefill a chunk; size 0 leaves a row out."""
    decode, prefill = [], []
    for row, size in enumerate(sizes):
        left = int(columns.length[row] - columns.context[row])
        columns.new[row] = min(size, left)
        if size and columns.length[row] > columns.prompt[row] and left == 1:
            decode.append(row)
        elif size:
            prefill.append(row)
    return Batch(columns, np.array(decode, np.int64), np.array(prefill, np.int64))


def commit(batch: Batch, data) -> None:
    """Every output row gets a token, out of few, so that sequences stay alike sometimes."""
    c = batch.columns
    for row in batch.output_rows():
        c.tokens[row, c.length[row]] = data.draw(st.integers(0, 1))
    outputs = batch.output_rows().copy()
    rows = np.concatenate([batch.decode, batch.prefill])
    c.context[rows] += c.new[rows]
    c.length[outputs] += 1


def unique_prefixes(batch: Batch, shared: bool) -> int:
    """Nodes of the tries of the prefills' tokens, a trie for each context length; or simply all their tokens."""
    c, nodes = batch.columns, []
    for row in batch.prefill:
        context, end = c.context[row], c.context[row] + c.new[row]
        nodes += [(context, *c.tokens[row, : at + 1]) for at in range(context, end)]
    return len(set(nodes) if shared else nodes)


def assert_equal_columns(rows: Rows, expected: Rows) -> None:
    for field in attrs.fields(Rows):
        one, other = getattr(rows, field.name), getattr(expected, field.name)
        if one is None or other is None:
            assert one is other, field.name
        elif field.name == "prefill_offsets" and not len(rows.prefill_lengths):
            continue
        else:
            assert np.array_equal(one.reshape(other.shape), other), field.name


def check_step(batch: Batch, rows: Rows, memory: dict[int, tuple]) -> None:
    """`memory` holds per slot the tokens of the sequence up to the one whose keys and values lie there."""
    c, size = batch.columns, batch.columns.block_size
    owners = [(row, i, i + 1) for i, row in enumerate(batch.decode)]
    working = [r for r in batch.prefill if c.context[r] + c.new[r] > _start(c, r, rows)]
    spans = zip(rows.prefill_offsets[:-1], rows.prefill_offsets[1:])
    owners += [(row, *span) for row, span in zip(working, spans, strict=True)]
    known = {}
    for row, first, end in owners:
        for token in range(first, end):
            known[token] = tuple(c.tokens[row, : rows.positions[token] + 1])
            assert rows.tokens[token] == known[token][-1]
            assert rows.lengths[token] == c.length[row]
    assert len(known) == rows.forwarded

    source = range(rows.forwarded) if rows.kv_source is None else rows.kv_source
    assert len(set(rows.slots)) == len(rows.slots) == len(source)
    memory |= {slot: known[token] for slot, token in zip(rows.slots, source)}
    assert all(slot >= size for slot in rows.slots), "block 0 is padding"

    tables = [*zip(rows.decode_blocks, rows.decode_lengths), *zip(rows.prefill_blocks, rows.prefill_lengths)]
    for (row, _, end), (table, length) in zip(owners, tables, strict=True):
        assert rows.positions[end - 1] == length - 1
        for position in range(length):
            slot = table[position // size] * size + position % size
            assert memory[slot] == tuple(c.tokens[row, : position + 1])
    for row in np.concatenate([batch.decode, batch.prefill]):
        for position in range(c.context[row] + c.new[row]):
            slot = c.blocks[row, position // size] * size + position % size
            assert memory[slot] == tuple(c.tokens[row, : position + 1])
    for row, token in zip(batch.output_rows(), rows.outputs, strict=True):
        assert known[token] == tuple(c.tokens[row, : c.length[row]])


def _start(c: Columns, row: int, rows: Rows) -> int:
    return c.context[row] + (c.shared[row] if c.leader[row] >= 0 else 0)


@examples(25)
@given(batches(VOCAB))
def test_groups_mean_what_an_operation_per_request_means(batch):
    stages = ("penalties", "draw", "top_k", "top_p", "min_p")
    model = build_model(small_model(vocab_size=VOCAB), "float32", ("prefill",)).merged(
        build_sampler(VOCAB, stages)
    )
    weights = evaluate_weights(model, random_tensors(model))
    cache = context_cache(model, weights, batch)
    passes, context = pipeline("prefix-dedup"), every_kernel()
    passes.decide(batch, StepView())
    grouped, single = step_graph(lower(batch, VOCAB)), lower_requests(batch, VOCAB)
    passes.run(grouped, "batch", context)
    passes.run(single, "batch", context)
    single.verify()
    groups = len(batch.decode) + len(batch.prefill)
    assert single.count("batch.group") == groups
    assert grouped.count("batch.group") == bool(len(batch.decode)) + bool(len(batch.prefill))
    one, other = (evaluate_step(g, model, weights, batch, cache) for g in (grouped, single))
    assert one.tokens == other.tokens
    for row, logits in one.logits.items():
        assert torch.equal(logits, other.logits[row])
    assert one.cache.keys() == other.cache.keys()


# the fingerprint


def decoding(count: int, *, length: int = 9, seed: int = 0, **sampling) -> Batch:
    columns = Columns(count, 32, 4)
    tokens = np.random.default_rng(seed).integers(VOCAB, size=(count, length)).tolist()
    for row in range(count):
        columns.fill(row, Request(str(row), tokens[row], SamplingParams(**sampling)), seed=row)
    columns.context[:], columns.new[:] = length - 1, 1
    return Batch(columns, np.arange(count), np.zeros(0, np.int64))


def prefilling(count: int, length: int) -> Batch:
    batch = decoding(count, length=length)
    batch.columns.context[:], batch.columns.new[:] = 0, length
    return Batch(batch.columns, np.zeros(0, np.int64), np.arange(count))


def test_values_do_not_change_the_fingerprint():
    one = decoding(6, temperature=0.5)
    other = decoding(7, length=20, seed=1, temperature=0.9)
    assert fingerprint(lower(one, VOCAB)) == fingerprint(lower(other, VOCAB))


def test_structure_changes_the_fingerprint():
    mixed = decoding(4)
    mixed.decode, mixed.prefill = np.array([0, 1, 2]), np.array([3])
    shared = prefilling(4, 4)
    shared.facts[Phase.PREFILL] = ("shared",)
    different = {
        "decode": decoding(4),
        "a bucket more": decoding(5),
        "prefill": prefilling(4, 4),
        "a bucket of tokens more": prefilling(4, 5),
        "mixed": mixed,
        "a fact": shared,
        "drawn": decoding(4, temperature=1.0),
        "top k": decoding(4, temperature=1.0, top_k=3),
        "penalties": decoding(4, presence_penalty=1.0),
    }
    prints = {name: fingerprint(lower(batch, VOCAB)) for name, batch in different.items()}
    assert len(set(prints.values())) == len(different)
    assert fingerprint(lower(decoding(4), VOCAB + 1)) not in prints.values()


@examples(60)
@given(batches(VOCAB), batches(VOCAB))
def test_equal_fingerprints_have_equal_text(one, other):
    blocks = []
    for batch in (one, other):
        PrefixDedup().decide(batch, StepView())
        blocks.append(lower(batch, VOCAB))
    prints = [fingerprint(block) for block in blocks]
    texts = [step_graph(block).text() for block in blocks]
    without_counts = [[part.split(" rows")[0].rstrip("0123456789") for part in t.split("<")] for t in texts]
    assert (prints[0] == prints[1]) == (without_counts[0] == without_counts[1])


def test_a_step_costs_the_same_python_calls_for_any_number_of_requests():
    def cost(batch: Batch) -> int:
        fingerprint(lower(batch, VOCAB))
        return calls(lambda: fingerprint(lower(batch, VOCAB)))

    at_256 = cost(decoding(256, temperature=0.5))
    assert at_256 <= 600
    assert cost(decoding(1024, temperature=0.5)) == at_256


# tables


def test_a_sealed_table_gives_no_values():
    table = Table(2, {"row": np.array([0, 1])})
    table.sealed = True
    with pytest.raises(PermissionError, match="structure pass read a value"):
        table.columns  # noqa: B018
    table.sealed = False
    assert table.columns["row"].tolist() == [0, 1]


def test_tables_are_sealed_while_passes_run():
    @dataclass(frozen=True)
    class Curious(Pass):
        name = "curious"
        graph = "batch"

        @rewrites(b.Group)
        def look(self, op, graph, context):
            op.table.data.columns  # noqa: B018

    graph = step_graph(lower(decoding(3), VOCAB))
    with pytest.raises(PermissionError):
        Pipeline([Curious()]).run(graph, "batch", every_kernel())
    tables = [a.data for op in graph.walk() for a in op.properties.values() if isinstance(a, TableAttr)]
    assert tables and not any(table.sealed for table in tables)
