"""What engines and control planes exchange: KV cache, quantization, accelerations. A leaf.

All are documents (see `Document`), validated when made. What a backend can do is in `target.py`.
"""

from __future__ import annotations

from attrs import field, frozen
from attrs.validators import optional

from sagellm import checks
from sagellm.documents import Document
from sagellm.errors import UserError

DTYPE_BYTES = {
    "float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1, "int8": 1, "int4": 0.5,
}  # fmt: skip
"""Bytes of one number. Two int4 share a byte."""
FLOATS = ("float32", "bfloat16", "float16")
"""Types that activations are computed in."""
KV_SCALES = {"int8": "float32"}
"""Of keys and values in a small type that our kernels know: the type of their scales."""
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "fp8_e4m3"}
SPARSITY_PATTERNS = ("none", "2:4", "block", "unstructured")
WEIGHT_BITS = {
    "none": (16, 32),
    "awq": (4,),
    "gptq": (2, 3, 4, 8),
    "fp8": (8,),
    "int8": (8,),
    "int4": (4,),
    "smooth_quant": (8,),
}
"""Quantization methods, and the bits that each leaves to a weight."""
SPECULATIVE_METHODS = ("ngram", "draft_model", "eagle")


def full_name(dtype: object) -> object:
    """A dtype without aliases; anything else as it is."""
    return ALIASES.get(dtype, dtype) if isinstance(dtype, str) else dtype


@frozen(kw_only=True)
class KVCacheSchema(Document):
    """How keys and values are stored: enough for another engine to read the blocks."""

    dtype: str = field(converter=full_name, validator=checks.one_of(DTYPE_BYTES))
    """A key of `DTYPE_BYTES`, or an alias: fp32, bf16, fp16, fp8 (which is fp8_e4m3)."""
    block_size: int = field(validator=checks.whole())
    """Tokens per block."""
    num_layers: int = field(validator=checks.whole())
    num_kv_heads: int = field(validator=checks.whole())
    """Heads of keys and values; fewer than query heads in models with grouped queries."""
    head_dim: int = field(validator=checks.whole())
    """Numbers in one head's key, and in its value."""
    scale_dtype: str | None = field(
        default=None, converter=full_name, validator=optional(checks.one_of(FLOATS))
    )
    """Type of the scales, one for each token, head, key and value; None: the numbers are stored without scales.

    A scale's bytes lie behind the `head_dim` numbers that it is for. int8 is symmetric: a number times its scale.
    """
    layout: str = field(default="NHD", validator=checks.one_of(("NHD", "HND")))
    """Order inside a block: N tokens, H heads, D the head's dimension."""

    def __attrs_post_init__(self) -> None:
        if self.scale_dtype is not None and self.dtype in FLOATS:
            raise UserError(f"scale_dtype is {self.scale_dtype!r} with dtype {self.dtype!r}; accepted: None")

    @property
    def bytes_per_block(self) -> int:
        """Keys and values of all layers and their scales, in bytes."""
        scale = DTYPE_BYTES[self.scale_dtype] if self.scale_dtype else 0
        per_head = self.head_dim * DTYPE_BYTES[self.dtype] + scale
        return int(2 * self.num_layers * self.num_kv_heads * per_head * self.block_size)


@frozen(kw_only=True)
class QuantizationProfile(Document):
    """How a model's numbers were made smaller. Bits are those of one number."""

    method: str = field(default="none", validator=checks.one_of(WEIGHT_BITS))
    weight_bits: int = field(default=16, validator=checks.whole())
    """Must be one of the method's in `WEIGHT_BITS`."""
    activation_bits: int = field(default=16, validator=checks.whole())
    kv_bits_prefill: int = field(default=16, validator=checks.whole())
    """Of keys and values that a prefill writes."""
    kv_bits_decode: int = field(default=16, validator=checks.whole())
    """Of keys and values that a decode writes."""
    sparsity_ratio: float = field(default=0.0, validator=checks.number(0, 1))
    """Part of the weights that are zero."""
    sparsity_pattern: str = field(default="none", validator=checks.one_of(SPARSITY_PATTERNS))
    """Where the zeros are; 2:4 is two in every four neighbours."""
    group_size: int | None = field(default=None, validator=optional(checks.whole()))
    """Weights that share a scale; None: all of an output."""
    symmetric: bool = field(default=True, validator=checks.flag)
    """Without zero points."""
    calibration_dataset: str | None = field(default=None, validator=optional(checks.text))
    """What the scales were found with."""
    calibration_samples: int = field(default=0, validator=checks.whole(0))

    def __attrs_post_init__(self) -> None:
        if self.weight_bits not in (bits := WEIGHT_BITS[self.method]):
            raise UserError(
                f"weight_bits is {self.weight_bits} with method {self.method!r}; "
                f"accepted: {', '.join(map(str, bits))}"
            )
        wanted = {"none": self.sparsity_ratio == 0, "2:4": self.sparsity_ratio == 0.5}
        if not wanted.get(self.sparsity_pattern, True):
            raise UserError(
                f"sparsity_ratio is {self.sparsity_ratio} with sparsity_pattern {self.sparsity_pattern!r}; "
                f"accepted: {'0' if self.sparsity_pattern == 'none' else '0.5'}"
            )


@frozen(kw_only=True)
class SpeculativeConfig(Document):
    """Tokens that are guessed and then verified in one step."""

    method: str = field(validator=checks.one_of(SPECULATIVE_METHODS))
    """ngram: copied from the sequence so far; draft_model: from a smaller model; eagle: from a head on the model."""
    draft_model: str | None = field(default=None, validator=optional(checks.text))
    """Folder or hub name of the model or head that guesses; None with ngram."""
    num_speculative_tokens: int = field(default=4, validator=checks.whole())
    """Guesses of one step."""

    def __attrs_post_init__(self) -> None:
        if (self.draft_model is None) != (self.method == "ngram"):
            accepted = "None" if self.method == "ngram" else "a folder or hub name"
            raise UserError(
                f"draft_model is {self.draft_model!r} with method {self.method!r}; accepted: {accepted}"
            )


@frozen(kw_only=True)
class AccelConfig(Document):
    """Accelerations that a control plane asks an engine for."""

    quantization: QuantizationProfile | None = field(
        default=None, validator=optional(checks.instance_of(QuantizationProfile, "a QuantizationProfile"))
    )
    """None: the numbers stay as the checkpoint has them."""
    sparsity: str = field(default="none", validator=checks.one_of(SPARSITY_PATTERNS))
    """Pattern of zero weights that kernels make use of."""
    speculative: SpeculativeConfig | None = field(
        default=None, validator=optional(checks.instance_of(SpeculativeConfig, "a SpeculativeConfig"))
    )
    """None: every token is computed in its own step."""
    flash_attention: bool = field(default=False, validator=checks.flag)
    """Attention that never holds the whole matrix of scores."""
    graphs: bool = field(default=False, validator=checks.flag)
    """Launch a step's kernels as one captured device graph."""
    cot_accel: bool = field(default=False, validator=checks.flag)
    """Shorten chains of thought."""

    @classmethod
    def default(cls) -> AccelConfig:
        """Nothing is asked for."""
        return cls()

    @classmethod
    def for_inference(cls) -> AccelConfig:
        """What changes no output but by rounding: flash attention and graphs."""
        return cls(flash_attention=True, graphs=True)
