"""Rotary embeddings are those of transformers, for every kind and for sequences of any length."""

import json

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sagellm.models.config import load_config
from sagellm.models.rope import cos_sin_table, dynamic_cos_sin, inverse_frequencies

SMALL = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 112,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {
    "default": {"rope_type": "default"},
    "theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3,
    "llama3-big": {**LLAMA3, "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192},
    "yarn": YARN,
    "yarn-big": {**YARN, "rope_theta": 1e6, "original_max_position_embeddings": 32768},
    "yarn-betas": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn-step": {**YARN, "beta_fast": 1, "beta_slow": 1, "truncate": False},
    "yarn-attention": {**YARN, "attention_factor": 1.3},
    "yarn-mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn-implied": {**YARN, "factor": None},
}


def pair(tmp_path, name, config_class=LlamaConfig):
    """One rope as transformers has it and as we read it from the folder that transformers writes."""
    theirs = config_class(**SMALL, rope_parameters=dict(ROPES[name]), architectures=["LlamaForCausalLM"])
    theirs.save_pretrained(tmp_path)
    return theirs, load_config(tmp_path).rope


def hf_cos_sin(config, length):
    """What transformers' rotary module gives a sequence of this length, laid out as our tables."""
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)


@pytest.mark.parametrize("name", [name for name in ROPES if ROPES[name]["rope_type"] != "default"])
@pytest.mark.parametrize("length", [None, 100, 1000])
def test_frequencies_are_those_of_transformers(tmp_path, name, length):
    # Qwen2's configuration has no head_dim field, Llama's has
    for config_class in (LlamaConfig, Qwen2Config):
        theirs, rope = pair(tmp_path, name, config_class)
        if not hasattr(theirs, "head_dim"):
            theirs.head_dim = 64
        expected, expected_factor = ROPE_INIT_FUNCTIONS[rope.kind](theirs, seq_len=length)
        frequencies, factor = inverse_frequencies(rope, length)
        assert frequencies.dtype == torch.float32
        assert torch.equal(frequencies, expected)
        assert factor == expected_factor


@pytest.mark.parametrize("name", ROPES)
def test_the_table_is_what_transformers_computes_in_its_forward_pass(tmp_path, name):
    theirs, rope = pair(tmp_path, name)
    table = cos_sin_table(rope, 256)
    assert table.shape == (256, rope.rotary_dim)
    assert torch.equal(table, hf_cos_sin(theirs, 256))
    assert torch.equal(cos_sin_table(rope, 256, torch.bfloat16), table.to(torch.bfloat16))


def test_a_trained_length_beside_the_rope_parameters_goes_first(tmp_path):
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-6}
    config = {**SMALL, **fields, "rope_scaling": YARN, "original_max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rope = load_config(tmp_path).rope
    assert rope.original_max_positions == 128
    assert torch.equal(cos_sin_table(rope, 256), hf_cos_sin(AutoConfig.from_pretrained(tmp_path), 256))


@pytest.mark.parametrize("length", [1, 255, 256, 257, 300, 768, 2000])
def test_dynamic_rope_follows_the_length_of_the_sequence(tmp_path, length):
    theirs, rope = pair(tmp_path, "dynamic")
    positions = torch.arange(length)
    ours = dynamic_cos_sin(rope, positions, torch.full_like(positions, length))
    # an angle may be off by its last float32 bits: torch's pow rounds differently in and out of vector code
    torch.testing.assert_close(ours, hf_cos_sin(theirs, length), atol=length * 2.0**-22, rtol=0)
    frequencies, _ = inverse_frequencies(rope, length)
    angles = positions[:, None] * frequencies
    torch.testing.assert_close(
        ours, torch.cat((angles.cos(), angles.sin()), -1), atol=length * 2.0**-20, rtol=0
    )


def test_dynamic_rope_within_the_original_context_is_the_table(tmp_path):
    _, rope = pair(tmp_path, "dynamic")
    positions = torch.arange(256)
    torch.testing.assert_close(
        dynamic_cos_sin(rope, positions, positions + 1), cos_sin_table(rope, 256), atol=6e-5, rtol=0
    )


def test_tokens_of_sequences_of_different_lengths_do_not_disturb_each_other(tmp_path):
    _, rope = pair(tmp_path, "dynamic")
    positions = torch.tensor([0, 299, 10, 700, 5], dtype=torch.int32)
    lengths = torch.tensor([1, 300, 11, 701, 500], dtype=torch.int32)
    together = dynamic_cos_sin(rope, positions, lengths)
    alone = [dynamic_cos_sin(rope, positions[i : i + 1], lengths[i : i + 1]) for i in range(5)]
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-4, rtol=0)
