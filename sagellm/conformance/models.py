"""Small random models of the families that are served, written as checkpoint folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sagellm.compiler import expected_tensors
from sagellm.models.config import load_config
from sagellm.models.decoder import build_model

COMMON = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": None,
}

FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "mistral-window": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 96,
    },
    "llama-head-48": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 192,
        "head_dim": 48,
    },
}
"""By name: what config.json says beside `COMMON`. Head size 48 is one that fewer kernels take."""


def write_model(folder: Path, family: str, **fields) -> Path:
    """A folder with config.json and random weights in bfloat16; norms are near 1, matrices near 1/sqrt(columns)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = COMMON | FAMILIES[family] | fields
    (folder / "config.json").write_text(json.dumps(config))
    model = build_model(load_config(folder, family), "bfloat16", ("prefill",))
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in expected_tensors(model).items():
        if len(shape) > 1:
            values = torch.randn(shape, generator=random) * 2 * shape[-1] ** -0.5
        elif name.endswith("bias"):
            values = torch.randn(shape, generator=random)
        else:
            values = 0.5 + torch.rand(shape, generator=random)
        tensors[name] = values.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    return folder
