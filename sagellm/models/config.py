"""A model folder's config.json and generation_config.json, read once and checked: `ModelConfig`.

What distinguishes the families is the table `FAMILIES`; the checks and the model builder are shared by all.
Defaults are those of transformers' configuration classes, so that a folder means the same here and there.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import attrs
from attrs import field, frozen

from sagellm.errors import UserError, unknown

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("silu",)


@frozen(kw_only=True)
class Family:
    """Where an architecture differs from the common decoder (transformers, models/*/modeling_*.py)."""

    qkv_bias: bool | str = False
    """Bias of the q, k and v projections: always, never, or as the config field of this name says."""
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    """RMS norm over each head of q and k, before RoPE."""
    sliding: str = "none"
    """none: full attention; all: every layer has `sliding_window`; layers: `layer_types` says which have."""
    defaults: dict[str, int] = field(factory=dict)
    """Fields that the family's config.json may leave out, as transformers fills them in."""


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        defaults={"bos_token_id": 1, "eos_token_id": 2},
    ),
    "MistralForCausalLM": Family(
        sliding="all",
        defaults={"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Family(
        qkv_bias=True,
        sliding="layers",
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "Qwen3ForCausalLM": Family(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        sliding="layers",
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
}


@frozen(kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and how it is stretched over more positions."""

    kind: str = "default"
    """One of ROPE_KINDS."""
    theta: float = 10000.0
    rotary_dim: int
    """Dimensions of a head that are rotated: all of them."""
    factor: float = 1.0
    """How many times longer than the trained context the stretched one is."""
    original_max_positions: int
    """Tokens of the context that the frequencies were trained for, before stretching."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """llama3: wavelengths above original/low are stretched, those below original/high are kept."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """yarn: rotations over the original context above fast are kept, those below slow are stretched."""
    attention_factor: float | None = None
    """yarn: scale of cos and sin; None computes it from factor, mscale and mscale_all_dim."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """yarn: round the ends of the ramp to whole dimensions."""


@frozen(kw_only=True)
class ModelConfig:
    """One decoder-only model: sizes, variations and special tokens. Made by `load_config`, valid by then."""

    name: str
    architecture: str
    """A key of FAMILIES."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    rope: RopeConfig
    max_positions: int
    """Tokens of the longest sequence (prompt and output) that can be served."""
    tie_embeddings: bool
    """The output projection is the embedding; the checkpoint need not hold `lm_head.weight`."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    """Per layer: a token sees itself and this many tokens less one before it; None is full attention."""
    dtype: str
    """What the weights were published in, one of DTYPES."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Any of these ends a sequence."""
    pad_token_id: int | None

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that differ whenever a field differs; the same in every process."""
        fields = json.dumps(attrs.asdict(self), sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()[:16]


def load_config(folder: Path, name: str | None = None) -> ModelConfig:
    """The model in `folder`, called `name` (default: the folder's name).

    Raises UserError where a file is missing or malformed, or a field is missing, wrong or not supported.
    Code that the folder brings along (`auto_map`) is never run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such folder: {str(folder)!r}; accepted: a folder with config.json")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"no config.json in {str(folder)!r}; accepted: a folder as Hugging Face models have it"
        )
    raw = read_json(path)

    architecture = _architecture(path, raw)
    family = FAMILIES[architecture]
    if raw.get("quantization_config"):
        raise UserError(
            f"{path}: quantization_config is not supported yet; accepted: {', '.join(DTYPES)} weights"
        )
    fields = _Fields(str(path), {**family.defaults, **raw})

    hidden_size = fields.whole("hidden_size")
    num_layers = fields.whole("num_hidden_layers")
    num_heads = fields.whole("num_attention_heads")
    num_kv_heads = fields.whole("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
    if fields.get("head_dim") is None and hidden_size % num_heads:
        raise fields.wrong(
            "hidden_size", f"a multiple of num_attention_heads, {num_heads}, or head_dim given"
        )
    head_dim = fields.whole("head_dim", hidden_size // num_heads)
    positions = fields.whole("max_position_embeddings")
    rope = _rope(fields, head_dim, positions)

    generation = _generation_config(folder)
    return ModelConfig(
        name=name or folder.resolve().name,
        architecture=architecture,
        vocab_size=fields.whole("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.whole("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps"),
        hidden_act=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        rope=rope,
        max_positions=_served_positions(rope, positions),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=_setting(fields, family.qkv_bias),
        o_bias=_setting(fields, family.o_bias),
        mlp_bias=_setting(fields, family.mlp_bias),
        qk_norm=family.qk_norm,
        windows=_windows(fields, family.sliding, num_layers),
        dtype=fields.choice("torch_dtype" if fields.get("dtype") is None else "dtype", DTYPES, "float32"),
        bos_token_id=_token_id(fields, "bos_token_id"),
        eos_token_ids=generation.token_ids("eos_token_id") or fields.token_ids("eos_token_id"),
        pad_token_id=_token_id(fields, "pad_token_id"),
    )


def read_json(path: Path) -> dict:
    """The JSON object in a file; UserError where it cannot be read or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; accepted: a JSON object")
    return value


@frozen
class _Fields:
    """One JSON object, read field by field with checks. A field that is null counts as absent."""

    where: str
    raw: dict

    def get(self, key: str, default: object = None) -> Any:
        value = self.raw.get(key)
        return default if value is None else value

    def wrong(self, key: str, accepted: str) -> UserError:
        if self.get(key) is None:
            return UserError(f"{self.where}: field {key!r} is missing; accepted: {accepted}")
        return UserError(f"{self.where}: {key} is {self.get(key)!r}; accepted: {accepted}")

    def whole(self, key: str, default: int | None = None, low: int = 1) -> int:
        value = self.get(key, default)
        if not _is_whole(value) or value < low:
            raise self.wrong(key, f"a whole number of at least {low}")
        return value

    def number(self, key: str, default: float | None = None, more_than: float = 0.0) -> float:
        value = self.get(key, default)
        if not (_is_whole(value) or isinstance(value, float)) or not more_than < value <= sys.float_info.max:
            raise self.wrong(key, f"a number of more than {more_than:g}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def choice(self, key: str, accepted: tuple[str, ...], default: str) -> str:
        value = self.get(key, default)
        if value not in accepted:
            raise self.wrong(key, ", ".join(accepted))
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or none: null, and -1 in some older folders."""
        value = self.get(key)
        ids = [one for one in (value if isinstance(value, list) else [value]) if one not in (None, -1)]
        if not all(_is_whole(one) and one >= 0 for one in ids):
            raise self.wrong(key, "a token id (a whole number of at least 0) or a list of them")
        return tuple(ids)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _architecture(path: Path, raw: dict) -> str:
    names = raw.get("architectures")
    accepted = ", ".join(FAMILIES)
    if not names or not isinstance(names, list):
        raise UserError(
            f"{path}: field 'architectures' is missing or no list; accepted: a list with one of {accepted}"
        )
    if names[0] not in list(FAMILIES):
        raise unknown(f"architecture in {path}", names[0], FAMILIES)
    return names[0]


def _generation_config(folder: Path) -> _Fields:
    path = folder / "generation_config.json"
    return _Fields(str(path), read_json(path) if path.is_file() else {})


def _setting(fields: _Fields, setting: bool | str) -> bool:
    return setting if isinstance(setting, bool) else fields.flag(setting, False)


def _token_id(fields: _Fields, key: str) -> int | None:
    ids = fields.token_ids(key)
    return ids[0] if ids else None


def _windows(fields: _Fields, sliding: str, num_layers: int) -> tuple[int | None, ...]:
    """Sliding window per layer, as transformers' configuration_*.py derive it from these fields."""
    full = (None,) * num_layers
    if sliding == "none":
        return full
    window = None if fields.get("sliding_window") is None else fields.whole("sliding_window")
    if sliding == "all":
        return (window,) * num_layers
    if not fields.flag("use_sliding_window", False):
        window = None

    kinds = fields.get("layer_types")
    if kinds is None:
        first = num_layers if window is None else fields.whole("max_window_layers", low=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
        raise fields.wrong("layer_types", f"a list of {num_layers} of {' or '.join(known)}")
    if window is None and "sliding_attention" in kinds:
        raise fields.wrong(
            "layer_types", "full_attention alone where use_sliding_window is false or no window is given"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(config: _Fields, head_dim: int, positions: int) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    `positions` is max_position_embeddings. Precedence as in transformers, modeling_rope_utils.py,
    `convert_rope_params_to_dict` and `standardize_rope_params`.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    raw = config.get(key) or {}
    if not isinstance(raw, dict) or any(isinstance(value, dict) for value in raw.values()):
        raise config.wrong(key, "one object of rope parameters for all layers")
    rope = _Fields(f"{config.where}: {key}", raw)

    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise unknown(f"rope type in {config.where}", kind, ROPE_KINDS)
    for fields in (rope, config):
        if fields.number("partial_rotary_factor", 1.0) != 1.0:
            raise fields.wrong("partial_rotary_factor", "1.0, the whole head")
    if head_dim % 2 or (kind == "dynamic" and head_dim == 2):
        raise UserError(
            f"{config.where}: head_dim is {head_dim}; accepted: an even number, above 2 for dynamic rope"
        )

    original = positions
    if kind in ("llama3", "yarn"):
        original = config.whole(
            "original_max_position_embeddings", rope.whole("original_max_position_embeddings", positions)
        )
    known = RopeConfig(
        kind=kind,
        theta=rope.number("rope_theta", config.number("rope_theta", 10000.0, more_than=1), more_than=1),
        rotary_dim=head_dim,
        original_max_positions=original,
    )
    if kind in ("linear", "dynamic"):
        return attrs.evolve(known, factor=_factor(rope))
    if kind == "llama3":
        low = rope.number("low_freq_factor")
        return attrs.evolve(
            known,
            factor=_factor(rope),
            low_freq_factor=low,
            high_freq_factor=rope.number("high_freq_factor", more_than=low),
        )
    if kind == "yarn":
        return attrs.evolve(
            known,
            factor=_factor(rope, positions / original),
            beta_fast=rope.number("beta_fast", known.beta_fast),
            beta_slow=rope.number("beta_slow", known.beta_slow),
            attention_factor=rope.optional_number("attention_factor"),
            mscale=rope.optional_number("mscale"),
            mscale_all_dim=rope.optional_number("mscale_all_dim"),
            truncate=rope.flag("truncate", known.truncate),
        )
    return known


def _factor(rope: _Fields, default: float | None = None) -> float:
    factor = rope.number("factor", default)
    if factor < 1:
        raise rope.wrong("factor", "a number of at least 1")
    return factor


def _served_positions(rope: RopeConfig, positions: int) -> int:
    """Tokens that can be served, where config.json says `positions` (its max_position_embeddings).

    Folders with linear or dynamic rope keep the trained length there, those with llama3 the stretched one,
    those with yarn either; vLLM reads them the same way (config/model.py, `_get_and_verify_max_len`).
    """
    if rope.kind in ("linear", "dynamic"):
        return int(positions * rope.factor)
    if rope.kind == "yarn":
        return int(rope.original_max_positions * rope.factor)
    return positions
