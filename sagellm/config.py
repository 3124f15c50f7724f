"""Configuration and the schemas that engines exchange. A leaf; every value is validated here, at the edge."""

from __future__ import annotations

import math
from pathlib import Path

from attrs import field, frozen

from sagellm.errors import UserError, unknown

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _positive(instance: object, attribute, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{attribute.name} is {value!r}; accepted: a whole number of at least 1")


def _fraction(instance: object, attribute, value: object) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 < value <= 1:
        raise UserError(f"{attribute.name} is {value!r}; accepted: a number more than 0 and at most 1")


@frozen(kw_only=True)
class KVCacheSchema:
    """How keys and values are stored: enough for another engine to read the blocks."""

    dtype: str
    block_size: int = field(validator=_positive)
    """Tokens per block."""
    num_layers: int = field(validator=_positive)
    num_kv_heads: int = field(validator=_positive)
    head_dim: int = field(validator=_positive)
    layout: str = "NHD"
    """Order inside a block: tokens, heads, head dimension."""

    @property
    def bytes_per_block(self) -> int:
        """Keys and values of all layers, in bytes."""
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]
        return per_token * self.block_size


@frozen(kw_only=True)
class EngineConfig:
    """All settings of one engine."""

    model: str = "builtin"
    """A folder, a name on the Hugging Face hub, or `builtin`."""
    target: str = "cpu"
    dtype: str = field(default="auto")
    """Type of weights and activations; auto takes the checkpoint's."""
    pipeline: str | None = None
    """Passes as text; None is the default pipeline."""
    block_size: int = field(default=16, validator=_positive)
    max_sequences: int = field(default=64, validator=_positive)
    """Sequences that run at the same time."""
    max_batched_tokens: int = field(default=2048, validator=_positive)
    """Tokens forwarded in one step; longer prompts are cut into chunks. Sequences that decode always take part."""
    max_length: int | None = field(default=None)
    """Tokens of a sequence, prompt and output; None takes the model's."""
    kv_memory_fraction: float = field(default=0.3, validator=_fraction)
    """Part of the free memory that the KV cache may take."""
    seed: int = field(default=0)
    """Where requests without a seed get theirs: the same requests in the same order draw the same tokens."""
    order: str = "fcfs"
    max_queue: int = 1024
    host_kv_gib: float = 0.0
    prefix_caching: bool = True
    core: str = "inline"
    max_restarts: int = 3
    record: Path | None = field(
        default=None, converter=lambda folder: None if folder is None else Path(folder)
    )
    """Folder where every step is written, to be run again by `sagellm replay`; None writes nothing."""
    verify: str = "weak"
    """Checks on a graph that is compiled: off, weak or full."""

    @seed.validator
    def _check_seed(self, attribute, value) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UserError(f"seed is {value!r}; accepted: a whole number of at least 0")

    @max_length.validator
    def _check_max_length(self, attribute, value) -> None:
        if value is not None:
            _positive(self, attribute, value)

    @dtype.validator
    def _check_dtype(self, attribute, value) -> None:
        if value not in ("auto", *DTYPE_BYTES):
            raise unknown("dtype", value, ("auto", *DTYPE_BYTES))
