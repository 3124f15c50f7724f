"""Every operation has a meaning, and the meanings are those of transformers."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from attrs import asdict
from checkpoints import load_oracle, save_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from strategies import every_kernel, examples
from xdsl.dialects.builtin import DictionaryAttr

from sagellm.backends import sampling as kernels
from sagellm.batch import Batch, Columns, Request, SamplingParams
from sagellm.errors import UserError
from sagellm.ir.attrs import tensor
from sagellm.ir.build import attribute, properties
from sagellm.ir.dialects import DIALECTS, comm, nn
from sagellm.ir.dialects import weights as weights_dialect
from sagellm.ir.graph import IRGraph
from sagellm.ir.lower import lower, step_graph
from sagellm.ir.reference import (
    MEANINGS,
    Forwarded,
    LogicalRows,
    evaluate_model,
    evaluate_step,
    evaluate_weights,
)
from sagellm.ir.reference.values import How, LoadScope, ModelScope
from sagellm.models.config import RopeConfig, load_config
from sagellm.models.decoder import build_model, build_sampler
from sagellm.models.rope import cos_sin_table, dynamic_cos_sin
from sagellm.passes import pipeline
from sagellm.passes.driver import StepView
from sagellm.random import uniform

STRUCTURE = {"nn.func", "nn.return", "batch.step", "weights.load"}
EFFECTS = {
    "kv.evict": ((), ("pool",)),
    "kv.offload": (("kv",), ("host",)),
    "kv.fetch": (("host",), ("kv",)),
    "kv.copy": (("kv",), ("kv",)),
    "nn.call": (("kv",), ("kv",)),
    "nn.repeat": (("kv",), ("kv",)),
    "nn.kv_write": ((), ("kv",)),
    "nn.rope_kv_write": ((), ("kv",)),
    "nn.attention": (("kv",), ()),
    "comm.all_reduce": (("network",), ("network",)),
    "comm.linear_all_reduce": (("network",), ("network",)),
    "comm.all_gather": (("network",), ("network",)),
    "comm.reduce_scatter": (("network",), ("network",)),
    "comm.all_to_all": (("network",), ("network",)),
    "comm.send": (("network",), ("network",)),
    "comm.recv": (("network",), ("network",)),
    "comm.start": (("network",), ("network",)),
    "weights.store": ((), ("weights",)),
    "batch.group": (("sequences",), ()),
    "batch.rows": (("sequences", "pool"), ()),
    "batch.sampling": (("sequences",), ()),
    "batch.forward": (("kv",), ("kv",)),
    "batch.commit": ((), ("sequences",)),
    "batch.report": ((), ("sequences",)),
    "kv.allocate": (("sequences",), ("pool",)),
    "spec.branch": (("sequences",), ()),
    "spec.verify": (("sequences",), ()),
    "spec.commit": (("kv", "sequences"), ("kv", "pool")),
}
"""What each operation reads and writes besides its values; all others are pure."""

OPERATIONS = {op.name: op for dialect in DIALECTS for op in dialect.operations}


def test_every_operation_has_a_meaning():
    assert OPERATIONS.keys() - MEANINGS.keys() == STRUCTURE
    assert MEANINGS.keys() <= OPERATIONS.keys()


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_operations_say_what_they_read_and_write(name):
    op = OPERATIONS[name]
    assert EFFECTS.get(name, ((), ())) == (op.READS, op.WRITES)
    assert op.__doc__ or name in ("nn.add", "nn.silu", "nn.mul", "nn.cast", "nn.return")


# models


FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-mqa-biases": (
        "LlamaForCausalLM",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama3-rope": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 3}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-mixed-windows": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 24}),
    "qwen3-yarn": (
        "Qwen3ForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, tmp_path_factory):
    """(model graph with sampler, weights, transformers' model)"""
    architecture, fields = FAMILIES[request.param]
    folder = save_checkpoint(tmp_path_factory.mktemp(request.param), architecture, **fields)
    oracle = load_oracle(folder)
    config = load_config(folder)
    graph = build_model(config, "float32", ("decode", "prefill")).merged(build_sampler(config.vocab_size, ()))
    return graph, evaluate_weights(graph, oracle.state_dict().__getitem__), oracle


def expected(oracle: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return oracle(torch.tensor([tokens])).logits[0]


def forwarded(row: int, tokens: list[int], start: int, end: int) -> Forwarded:
    return Forwarded(row, range(start, end), tuple(tokens[start:end]), len(tokens), tuple(range(start, end)))


def test_logits_are_those_of_transformers_whole_in_chunks_and_token_by_token(served):
    graph, weights, oracle = served
    texts = [np.random.default_rng(row).integers(300, size=size).tolist() for row, size in enumerate((9, 6))]
    cache = {}
    ends = ((0, 0), (4, 6), (8, 6), (9, 6))
    got = [[], []]
    for before, after in pairwise(ends):
        parts = [forwarded(row, texts[row], before[row], after[row]) for row in (0, 1)]
        logits = evaluate_model(graph, weights, LogicalRows(tuple(parts)), cache)
        cut = after[0] - before[0]
        got[0].append(logits[:cut])
        got[1].append(logits[cut:])
    for row in (0, 1):
        torch.testing.assert_close(torch.cat(got[row]), expected(oracle, texts[row]), atol=2e-4, rtol=1e-4)
    assert all(len(keys) == len(texts[row]) for row in cache for keys, _ in cache[row].values())


def test_steps_continue_greedily_as_transformers_does_with_shared_beginnings(served):
    graph, weights, oracle = served
    texts = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 1], [2]]
    columns = Columns(len(texts), 32, 4)
    for row, text in enumerate(texts):
        columns.fill(row, Request(str(row), text), seed=row)
    rows, cache = np.arange(len(texts)), {}
    columns.new[:] = columns.length
    passes = pipeline("prefix-dedup")
    for _ in range(3):
        decoding = columns.new[0] == 1
        batch = Batch(columns, *((rows, rows[:0]) if decoding else (rows[:0], rows)))
        passes.decide(batch, StepView())
        step = step_graph(lower(batch, 300))
        passes.run(step, "batch", every_kernel())
        assert step.count("batch.share") == (not decoding)
        result = evaluate_step(step, graph, weights, batch, cache)
        cache = result.cache
        for row, text in enumerate(texts):
            logits = expected(oracle, text)[-1]
            torch.testing.assert_close(result.logits[row], logits, atol=2e-4, rtol=1e-4)
            assert result.tokens[row] == int(logits.argmax())
            columns.tokens[row, len(text)] = result.tokens[row]
            text.append(result.tokens[row])
        columns.context[:] = columns.length
        columns.length += 1
        columns.new[:] = 1


# rope


ROPES = [
    RopeConfig(rotary_dim=16, original_max_positions=64),
    RopeConfig(rotary_dim=16, original_max_positions=64, theta=1e6),
    RopeConfig(rotary_dim=16, original_max_positions=64, kind="linear", factor=2.5),
    RopeConfig(rotary_dim=64, original_max_positions=64, kind="llama3", factor=8.0),
    RopeConfig(rotary_dim=64, original_max_positions=8192, kind="llama3", factor=32.0, theta=5e5),
    RopeConfig(rotary_dim=64, original_max_positions=64, kind="yarn", factor=4.0),
    RopeConfig(rotary_dim=64, original_max_positions=64, kind="yarn", factor=4.0, truncate=False),
    RopeConfig(rotary_dim=8, original_max_positions=64, kind="yarn", factor=4.0, beta_fast=1.0),
    RopeConfig(rotary_dim=16, original_max_positions=64, kind="yarn", factor=4.0, attention_factor=1.3),
    RopeConfig(
        rotary_dim=16, original_max_positions=64, kind="yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.7
    ),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: f"{rope.kind}-{rope.rotary_dim}")
def test_rope_tables_are_the_models(rope):
    parameters = {k: v for k, v in asdict(rope).items() if k != "kind" and v is not None}
    attributes = {k: attribute("", int(v) if isinstance(v, bool) else v) for k, v in parameters.items()}
    op = weights_dialect.RopeTable.create(
        result_types=[tensor("float32", 40, rope.rotary_dim)],
        properties=properties({"kind": rope.kind, "parameters": DictionaryAttr(attributes)}),
    )
    table = MEANINGS[op.name](LoadScope(read=None, layer=0, last=True), op)
    torch.testing.assert_close(table, cos_sin_table(rope, 40), atol=2e-5, rtol=1e-5)


@examples(30)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.sampled_from([1.0, 2.5]), st.integers(2, 40))
def test_dynamic_rope_is_the_models(lengths, factor, original):
    rope = RopeConfig(rotary_dim=8, original_max_positions=original, kind="dynamic", factor=factor)
    rows = LogicalRows(
        tuple(
            Forwarded(row, range(length // 2, length), (0,) * (length - length // 2), length, ())
            for row, length in enumerate(lengths)
        )
    )
    op = nn.RopeDynamic.create(
        result_types=[tensor("float32", None, 8)],
        properties=properties({"theta": rope.theta, "factor": factor, "original": original}),
    )
    angles = MEANINGS[op.name](None, op, rows)
    torch.testing.assert_close(
        angles, dynamic_cos_sin(rope, rows.positions, rows.lengths), atol=1e-5, rtol=1e-5
    )


# sampling


SAMPLINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.4, 1.0, 3.0]),
    top_k=st.integers(0, 8),
    top_p=st.sampled_from([1.0, 0.8, 0.3, 0.05]),
    min_p=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.5]),
    presence_penalty=st.sampled_from([0.0, -1.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
)


@examples(40)
@given(st.lists(SAMPLINGS, min_size=1, max_size=4), st.integers(0, 2**32))
def test_sampling_is_that_of_the_kernels(how, seed):
    random = np.random.default_rng(seed)
    columns, count, vocabulary = Columns(len(how), 16, 4), len(how), 8
    for row, sampling in enumerate(how):
        columns.fill(row, Request(str(row), random.integers(vocabulary, size=6).tolist(), sampling), seed=row)
        columns.prompt[row] = random.integers(1, 7)
    logits = torch.from_numpy(random.normal(size=(count, vocabulary)) * 3).float()
    value, scope = How(tuple(range(count)), columns), ModelScope({}, None, {}, None)
    c = {name: torch.from_numpy(getattr(columns, name)) for name in ("tokens", "prompt", "length")}

    def meaning(op, logits):
        return MEANINGS[op.name](scope, op.create(result_types=[]), logits, value)

    def column(name):
        return torch.from_numpy(getattr(columns, name))

    penalties = (column(name) for name in ("repetition", "presence", "frequency"))
    expected = kernels.penalize(logits, c["tokens"].long(), c["prompt"], c["length"], *penalties)
    torch.testing.assert_close(logits := meaning(nn.Penalize, logits), expected)
    expected = kernels.temperature_scale(logits, column("temperature"))
    torch.testing.assert_close(logits := meaning(nn.Temperature, logits), expected)
    for op, kernel in ((nn.TopK, kernels.top_k), (nn.TopP, kernels.top_p), (nn.MinP, kernels.min_p)):
        name = op.name.removeprefix("nn.")
        assert torch.equal(meaning(op, logits), kernel(logits, column(name))), name
    numbers = torch.from_numpy(uniform(columns.seed, columns.length, columns.sample))
    drawn = kernels.draw(logits, numbers, column("temperature") == 0)
    assert meaning(nn.Draw, logits).tolist() == drawn.tolist()


# collectives and errors


def test_collectives_over_two_ranks():
    tensors = [torch.arange(8.0).reshape(2, 4), torch.ones(2, 4)]
    type_ = tensor("float32", None, 4)

    def on(rank: int, op: type, **values) -> torch.Tensor:
        scope = ModelScope({}, None, {}, None, exchange=lambda group, x: (rank, tensors))
        made = op.create(result_types=[type_], properties=properties({"group": "tensor", **values}))
        return MEANINGS[op.name](scope, made, tensors[rank])

    total = tensors[0] + tensors[1]
    for rank in (0, 1):
        assert torch.equal(on(rank, comm.AllReduce), total)
        assert torch.equal(on(rank, comm.AllGather, dim=1), torch.cat(tensors, dim=1))
        part = on(rank, comm.ReduceScatter, dim=0)
        assert torch.equal(part, total[rank : rank + 1])


def test_a_position_cannot_be_skipped_in_the_cache():
    scope = ModelScope({}, 0, {}, None)
    write = nn.KvWrite.create(properties=properties({"head_dim": 4}))
    rows = LogicalRows((Forwarded(3, range(2, 4), (0, 0), 4, ()),))
    with pytest.raises(UserError, match="sequence 3 writes position 2 of layer 0, where 0 are cached"):
        MEANINGS["nn.kv_write"](scope, write, torch.zeros(2, 8), torch.zeros(2, 8), rows)


def test_an_operation_without_meaning_is_named(monkeypatch):
    monkeypatch.delitem(MEANINGS, "batch.rows")
    columns = Columns(1, 8, 4)
    columns.fill(0, Request("0", [1, 2]), seed=0)
    columns.new[0] = 2
    batch = Batch(columns, np.array([], np.int64), np.array([0]))
    with pytest.raises(UserError, match=r"batch\.rows has no meaning"):
        evaluate_step(step_graph(lower(batch, 8)), IRGraph(), {}, batch, {})
