"""Every operation has a meaning, and the meanings are those of transformers."""

import numpy as np
import pytest
import torch
import transformers
from checkpoints import load_oracle, save_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from sagellm.backends import sampling as kernels
from sagellm.batch import Batch, Columns, Request, SamplingParams, Stage
from sagellm.errors import UserError
from sagellm.ir.attrs import group_type, tensor
from sagellm.ir.build import Body
from sagellm.ir.dialects import DIALECTS, comm, nn
from sagellm.ir.lower import lower, stage_words, step_graph
from sagellm.ir.reference import MEANINGS, Forwarded, LogicalRows, evaluate_model, evaluate_step
from sagellm.ir.reference import evaluate_weights as load
from sagellm.ir.reference.values import How, ModelScope
from sagellm.models.config import RopeConfig, load_config
from sagellm.models.decoder import build_model, build_sampler
from sagellm.models.rope import cos_sin_table, dynamic_cos_sin
from sagellm.passes import pipeline
from strategies import every_kernel

STRUCTURE = {"nn.func", "nn.return", "batch.step", "weights.load"}
EFFECTS = {
    "nn.call": (("kv",), ("kv",)),
    "nn.repeat": (("kv",), ("kv",)),
    "nn.kv_write": ((), ("kv",)),
    "nn.attention": (("kv",), ()),
    "comm.all_reduce": (("network",), ("network",)),
    "comm.all_gather": (("network",), ("network",)),
    "comm.reduce_scatter": (("network",), ("network",)),
    "weights.store": ((), ("weights",)),
    "batch.group": (("sequences",), ()),
    "batch.rows": (("sequences", "pool"), ()),
    "batch.sampling": (("sequences",), ()),
    "batch.forward": (("kv",), ("kv",)),
    "batch.commit": ((), ("sequences",)),
    "kv.allocate": (("sequences",), ("pool",)),
}
"""What each operation reads and writes besides its values; all others are pure."""

OPERATIONS = {op.name: op for dialect in DIALECTS for op in dialect.operations}


def test_every_operation_has_a_meaning():
    assert OPERATIONS.keys() - MEANINGS.keys() == STRUCTURE
    assert MEANINGS.keys() <= OPERATIONS.keys()


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_operations_say_what_they_read_and_write(name):
    op = OPERATIONS[name]
    assert (op.READS, op.WRITES) == EFFECTS.get(name, ((), ()))
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
    return graph, load(graph, oracle.state_dict().__getitem__), oracle


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
    for before, after in zip(ends, ends[1:]):
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
        passes.decide(batch)
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


def small_config(rope: RopeConfig):
    from strategies import model_configs

    from attrs import evolve

    config = model_configs().example()
    return evolve(config, head_dim=rope.rotary_dim, rope=rope)
