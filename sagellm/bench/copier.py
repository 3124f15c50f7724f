"""A model that quotes: it goes on as the place of its text does that has most of the same tokens before it.

Its weights are written, not trained: heads that look one to eight tokens back, and behind them one that looks for the
place whose eight tokens before are those at the end (induction heads: Olsson et al. 2022). It has the sizes of the
built-in model, so that its steps take as long, and the built-in model's tokenizer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from sagellm.models.hub import BUILTIN

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 4096, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "rope_theta": 1e12, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "tie_word_embeddings": False, "use_sliding_window": False, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
HIDDEN, HEAD, HALF, HEADS = 256, 64, 32, 4
CODE, KEY = 64, 5
"""A token is a code of so many signs; by the first of them, places are compared."""
BACK = 8
TURNING = 11
"""Pairs of a head that turn fast enough to tell positions; the others hardly turn and compare codes."""
FOUND = CODE + BACK * KEY
"""Where the code of the token to say is."""


def write_copier(folder: Path) -> Path:
    """Write the model into an empty folder, in Hugging Face's form; returns it."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (CONFIG["vocab_size"], CODE))
    weights = {"model.norm.weight": np.ones(HIDDEN)}
    weights["model.embed_tokens.weight"] = np.pad(signs, ((0, 0), (0, HIDDEN - CODE)))
    weights["lm_head.weight"] = np.pad(0.5 * signs, ((0, 0), (FOUND, HIDDEN - FOUND - CODE)))
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, value in _layer(layer).items():
            weights[f"model.layers.{layer}.{name}"] = value
    save_file({name: torch.tensor(value, dtype=torch.float32) for name, value in weights.items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder / name)
    return folder


def _layer(number: int) -> dict[str, np.ndarray]:
    """Two look back, the third looks for the place; all others, and what is no head, add nothing."""
    wide = CONFIG["intermediate_size"]
    q, k, v, o = (np.zeros((HIDDEN, HIDDEN)) for _ in range(4))
    q_bias, k_bias = np.zeros(HIDDEN), np.zeros(HIDDEN)
    pairs, code, looking = np.arange(HALF), np.arange(CODE), BACK // HEADS
    known = CODE + min(number * HEADS, BACK) * KEY
    length = np.sqrt(known / HIDDEN)  # what the norm divides by, as all that is known are signs
    if number < looking:
        for head in range(HEADS):
            at, back = head * HEAD, number * HEADS + head
            behind = (back + 1) * CONFIG["rope_theta"] ** (-pairs[:TURNING] / HALF)
            q_bias[at : at + TURNING] = 17
            k_bias[at : at + TURNING] = 17 * np.cos(behind)
            k_bias[at + HALF : at + HALF + TURNING] = 17 * np.sin(behind)
            v[at + code[:KEY], code[:KEY]] = length
            o[CODE + back * KEY + code[:KEY], at + code[:KEY]] = 1
    if number == looking:
        slow = np.concatenate([pairs[TURNING:], HALF + pairs[TURNING:]])[: BACK * KEY]
        ends = np.concatenate([code[:KEY], np.arange(CODE, FOUND - KEY)])
        q[slow, ends] = k[slow, np.arange(CODE, FOUND)] = 5 * length
        v[code, code] = length
        o[FOUND + code, code] = 1
    norm = np.ones(HIDDEN)
    return {
        "self_attn.q_proj.weight": q, "self_attn.q_proj.bias": q_bias,
        "self_attn.k_proj.weight": k, "self_attn.k_proj.bias": k_bias,
        "self_attn.v_proj.weight": v, "self_attn.v_proj.bias": np.zeros(HIDDEN),
        "self_attn.o_proj.weight": o,
        "mlp.gate_proj.weight": np.zeros((wide, HIDDEN)), "mlp.up_proj.weight": np.zeros((wide, HIDDEN)),
        "mlp.down_proj.weight": np.zeros((HIDDEN, wide)),
        "input_layernorm.weight": norm, "post_attention_layernorm.weight": norm,
    }  # fmt: skip
