"""A model folder means the same here as in transformers, and a bad one is refused in one line."""

import json
import subprocess
import sys

import attrs
import pytest
import transformers

from sagellm.errors import UserError
from sagellm.models.config import FAMILIES, ModelConfig, load_config

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
CONFIGS = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
}


def write(folder, architecture="LlamaForCausalLM", **fields):
    config = {**SMALL, "architectures": [architecture], "num_key_value_heads": 2, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hf_saved(folder, architecture, **fields):
    """The folder as transformers writes it, and transformers' own configuration."""
    config = CONFIGS[architecture](
        **{**SMALL, "num_key_value_heads": 2, **fields}, architectures=[architecture]
    )
    config.save_pretrained(folder)
    return config


def hf_windows(config):
    layers = range(config.num_hidden_layers)
    if config.model_type == "mistral":
        return tuple(config.sliding_window for _ in layers)
    kinds = getattr(config, "layer_types", None) or ["full_attention" for _ in layers]
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds)


def assert_same(ours: ModelConfig, theirs):
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.windows == hf_windows(theirs)
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.kind == theirs.rope_parameters["rope_type"]
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.pad_token_id == theirs.pad_token_id


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_folder_with_only_the_needed_fields_gets_the_defaults_of_transformers(tmp_path, architecture):
    model_type = CONFIGS[architecture].model_type
    raw = {**SMALL, "architectures": [architecture], "model_type": model_type, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert_same(load_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_folder_written_by_transformers_is_read_back_the_same(tmp_path, architecture):
    theirs = hf_saved(
        tmp_path,
        architecture,
        tie_word_embeddings=True,
        eos_token_id=[2, 5],
        pad_token_id=7,
        dtype="bfloat16",
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    ours = load_config(tmp_path)
    assert_same(ours, theirs)
    assert ours.dtype == "bfloat16"
    assert ours.max_positions == SMALL["max_position_embeddings"]
    assert ours.name == tmp_path.name
    assert load_config(tmp_path, name="mine").name == "mine"


@pytest.mark.parametrize(
    "switches", [{}, {"attention_bias": True}, {"attention_bias": True, "mlp_bias": True}]
)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_biases_and_norms_are_those_of_the_model_that_transformers_builds(tmp_path, architecture, switches):
    theirs = hf_saved(tmp_path, architecture, **switches)
    ours = load_config(tmp_path)
    names = set(dict(getattr(transformers, architecture)(theirs).named_parameters()))
    layer = "model.layers.0."
    assert ours.qkv_bias == (layer + "self_attn.q_proj.bias" in names)
    assert ours.qkv_bias == (layer + "self_attn.v_proj.bias" in names)
    assert ours.o_bias == (layer + "self_attn.o_proj.bias" in names)
    assert ours.mlp_bias == (layer + "mlp.down_proj.bias" in names)
    assert ours.qk_norm == (layer + "self_attn.q_norm.weight" in names)


@pytest.mark.parametrize(
    ("architecture", "fields", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 16}, (None, None, None)),
        ("MistralForCausalLM", {"sliding_window": 16}, (16, 16, 16)),
        ("MistralForCausalLM", {"sliding_window": None}, (None, None, None)),
        ("Qwen2ForCausalLM", {"sliding_window": 16, "max_window_layers": 1}, (None, None, None)),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 16, "max_window_layers": 1, "use_sliding_window": True},
            (None, 16, 16),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (16, None, 16),
        ),
    ],
)
def test_sliding_windows_per_layer(tmp_path, architecture, fields, windows):
    raw_folder, saved_folder = tmp_path / "raw", tmp_path / "saved"
    raw_folder.mkdir()
    theirs = hf_saved(saved_folder, architecture, **fields)
    assert load_config(write(raw_folder, architecture, **fields)).windows == windows
    assert load_config(saved_folder).windows == windows
    assert architecture == "LlamaForCausalLM" or hf_windows(theirs) == windows


OLD = {"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
NEW = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 2e4}}


def test_rope_means_the_same_in_the_old_and_the_new_style(tmp_path):
    old = load_config(write(tmp_path, **OLD))
    new = load_config(write(tmp_path, **NEW))
    assert old == new
    assert (old.rope.kind, old.rope.factor, old.rope.theta) == ("linear", 2.0, 2e4)


YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("scaling", "positions", "original"),
    [
        (None, 256, 256),
        ({"rope_type": "linear", "factor": 2.0}, 512, 256),
        ({"type": "dynamic", "factor": 3.0}, 768, 256),
        ({**LLAMA3, "original_max_position_embeddings": 32}, 256, 32),
        (YARN, 1024, 256),
        ({**YARN, "original_max_position_embeddings": 64}, 256, 64),
        ({**YARN, "factor": None, "original_max_position_embeddings": 64}, 256, 64),
    ],
)
def test_the_served_context_is_the_stretched_one(tmp_path, scaling, positions, original):
    config = load_config(write(tmp_path, rope_scaling=scaling))
    assert config.max_positions == positions
    assert config.rope.original_max_positions == original


def test_the_generation_config_says_which_tokens_end_a_sequence(tmp_path):
    write(tmp_path, eos_token_id=2)
    assert load_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert load_config(tmp_path).eos_token_ids == (3, 4)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert load_config(tmp_path).eos_token_ids == (2,)


def test_dtype_is_read_in_both_spellings(tmp_path):
    assert load_config(write(tmp_path, torch_dtype="float16")).dtype == "float16"
    assert load_config(write(tmp_path, dtype="bfloat16")).dtype == "bfloat16"
    assert load_config(write(tmp_path)).dtype == "float32"


def test_code_in_the_folder_is_not_run(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    write(tmp_path, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert load_config(tmp_path).architecture == "LlamaForCausalLM"


def test_the_digest_is_stable_and_differs_with_every_field(tmp_path):
    config = load_config(write(tmp_path))
    assert config.digest == load_config(tmp_path).digest
    assert len(config.digest) == 16
    changed = [attrs.evolve(config, vocab_size=97), attrs.evolve(config, windows=(1, None, None))]
    changed.append(attrs.evolve(config, rope=attrs.evolve(config.rope, theta=9.0)))
    assert len({config.digest, *(one.digest for one in changed)}) == 4


def test_reading_a_config_needs_no_transformers(tmp_path):
    write(tmp_path)
    code = (
        "import sys; from sagellm.models.config import load_config; load_config(sys.argv[1]);"
        "assert not {'transformers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_size": None}, "field 'hidden_size' is missing; accepted: a whole number of at least 1"),
        ({"hidden_size": -64}, "hidden_size is -64; accepted: a whole number of at least 1"),
        ({"vocab_size": "96"}, "vocab_size is '96'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads is 3; accepted: a divisor of num_attention_heads, 4",
        ),
        ({"hidden_size": 66}, "hidden_size is 66; accepted: a multiple of num_attention_heads, 4"),
        ({"head_dim": 15}, "head_dim is 15; accepted: an even number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; accepted: a number of more than 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": 10**400}, "accepted: a number of more than 1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; accepted: silu"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; accepted: true or false"),
        ({"attention_bias": 1}, "attention_bias is 1; accepted: true or false"),
        ({"torch_dtype": "float8"}, "torch_dtype is 'float8'; accepted: float32, bfloat16, float16"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": [2, -7]}, "eos_token_id is [2, -7]"),
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'; accepted: LlamaForCausalLM, Mistral"),
        ({"architectures": None}, "field 'architectures' is missing"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is not supported yet"),
        (
            {"rope_scaling": {"type": "longrope"}},
            "'longrope'; accepted: default, linear, dynamic, llama3, yarn",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: field 'factor' is missing"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "factor is 0.5; accepted: a number of at least 1",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; accepted: one object"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "accepted: one object of rope parameters",
        ),
        (
            {"rope_scaling": {**LLAMA3, "high_freq_factor": 1}},
            "high_freq_factor is 1; accepted: a number of more",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; accepted: 1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; accepted: 1.0"),
    ],
)
def test_a_bad_field_is_refused_in_one_line_that_names_it(tmp_path, fields, said):
    with pytest.raises(UserError) as refused:
        load_config(write(tmp_path, **fields))
    assert said in str(refused.value)
    assert "config.json" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": ["full_attention"]},
        {"layer_types": ["full_attention", "full_attention", "chunked_attention"]},
        {
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "use_sliding_window": False,
        },
        {"sliding_window": 0, "use_sliding_window": True},
    ],
)
def test_layer_types_that_make_no_sense_are_refused(tmp_path, fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        load_config(write(tmp_path, "Qwen3ForCausalLM", **fields))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.json in"):
        load_config(tmp_path)
    for text, said in [
        ("{", "is not JSON"),
        ("[1]", "holds a list; accepted: a JSON object"),
        ("[" * 10**5, "JSON"),
    ]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=said):
            load_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not JSON"):
        load_config(tmp_path)
