"""Tiny random models, made with transformers and saved as folders that are kept for the whole test session.

A test module that needs them says `pytest_plugins = ["checkpoints"]` and takes the fixtures `checkpoint`,
`text_checkpoint` or `reciting_checkpoint`. Weights have enough spread that greedy outputs wander through the
vocabulary. Below stand two helpers: `serve` runs requests through an engine core, `continue_greedily` is what
transformers makes of a prompt.

PYTEST_DONT_REWRITE, as test modules import it before pytest takes it as a plug-in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sagellm.batch import Request, SamplingParams
from sagellm.config import EngineConfig
from sagellm.engine.core import EngineCore
from sagellm.engine.events import Token

torch.set_num_threads(1)  # two cores are shared by everything that runs here
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 300

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

CONFIGS = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
}

DEFAULTS = {
    "MistralForCausalLM": {"sliding_window": None},
    "Qwen3ForCausalLM": {"head_dim": 16},
}


def save_checkpoint(folder: Path, architecture: str = "LlamaForCausalLM", seed: int = 0, **fields) -> Path:
    """Write a model of this architecture into a folder; `fields` are those of its config.json.

    Two fields more: `dtype`, of the weights (float32 if left out), and `max_shard_size`, for several files.
    """
    shards = {"max_shard_size": fields.pop("max_shard_size")} if "max_shard_size" in fields else {}
    dtype = getattr(torch, fields.pop("dtype", "float32"))
    config = CONFIGS[architecture](**{**SIZES, **DEFAULTS.get(architecture, {}), **fields})
    model = getattr(transformers, architecture)(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5, generator=random)
            else:
                weight.normal_(0, 1.0 if name.endswith("bias") else 0.2, generator=random)
    model.to(dtype).save_pretrained(folder, **shards)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """`checkpoint(architecture, **fields)`: the folder of that model, made on first use. See `save_checkpoint`."""
    made: dict[str, Path] = {}

    def make(architecture: str = "LlamaForCausalLM", **fields) -> Path:
        key = json.dumps([architecture, fields], sort_keys=True)
        if key not in made:
            made[key] = save_checkpoint(tmp_path_factory.mktemp(architecture), architecture, **fields)
        return made[key]

    return make


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = [
    "The quick brown fox jumps over the lazy dog. The end.\n\nThe fox said: no, no, no!",
    "中文分词器把文字切成小块，再变成数字。今天天气很好，我们去公园。",
    "naïve café — “quotes” … 🙂🙃",
]


def save_tokenizer(
    folder: Path, vocabulary: int = VOCABULARY, pieces: Sequence[str] = (), template: str = CHAT_TEMPLATE
) -> tokenizers.Tokenizer:
    """A byte-level BPE, as GPT-2 and Qwen have it, trained on the spot; `<|end|>` ends a turn.

    `pieces` are tokens of their own.
    """
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    backend.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in pieces])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return backend


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory) -> Path:
    """A model with a tokenizer and a chat template; token 0, `<|end|>`, ends its answers."""
    folder = tmp_path_factory.mktemp("text")
    save_checkpoint(folder, "Qwen2ForCausalLM", eos_token_id=0)
    save_tokenizer(folder)
    return folder


RECITED = "aé中文🙂 STOP.qdz!"
"""What the model of `reciting_checkpoint` answers; no token comes twice."""


@pytest.fixture(scope="session")
def reciting_checkpoint(tmp_path_factory) -> Path:
    """A model that continues `<|assistant|>` with RECITED and `<|end|>`: each token calls for the next one."""
    folder = tmp_path_factory.mktemp("reciting")
    save_reciting(folder, RECITED, save_tokenizer(folder))
    return folder


def save_reciting(folder: Path, text: str, backend: tokenizers.Tokenizer) -> None:
    """Its layer adds nothing. Embeddings are signs, nearly orthogonal; a row of lm_head is that of the token before."""
    chain = backend.encode(f"<|assistant|>{text}<|end|>").ids
    assert len(set(chain)) == len(chain)
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 1, "eos_token_id": 0})
    model = transformers.LlamaForCausalLM(config)
    weights = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name] += 1
    random = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (VOCABULARY, SIZES["hidden_size"]), generator=random) * 2.0 - 1
    weights["model.embed_tokens.weight"] = signs
    weights["lm_head.weight"][chain[1:]] = signs[chain[:-1]]
    model.load_state_dict(weights)
    model.save_pretrained(folder)


def random_tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()


def make_core(folder: Path, pipeline: str | None = None, **settings) -> EngineCore:
    """A core over a folder, with room for eight sequences."""
    return EngineCore(EngineConfig(model=str(folder), pipeline=pipeline, **{"max_sequences": 8, **settings}))


def serve(core: EngineCore, prompts: Sequence[list[int]], *sampling: SamplingParams) -> list[list[Token]]:
    """The events of each prompt, all submitted at once; one `sampling` for all, or one for each."""
    hows = sampling * len(prompts) if len(sampling) == 1 else sampling
    events: dict[str, list[Token]] = {f"prompt {i}": [] for i in range(len(prompts))}
    for name, prompt, how in zip(events, prompts, hows, strict=True):
        core.submit(Request(name, prompt, how))
    while core.busy:
        for event in core.step():
            events[event.request_id].append(event)
    return list(events.values())


def tokens_of(events: Sequence[list[Token]]) -> list[list[int]]:
    return [[event.token for event in one] for one in events]


@cache
def load_oracle(folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def continue_greedily(
    folder: Path, prompt: Sequence[int], steps: int, **settings
) -> tuple[list[int], torch.Tensor]:
    """Tokens that transformers' `generate` gives this one prompt in float32, with its cache; logits [steps, V].

    The rotary embedding is made anew: a dynamic one remembers the longest sequence that it has seen.
    """
    model = load_oracle(folder)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    out = model.generate(
        torch.tensor([list(prompt)]),
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).float()
