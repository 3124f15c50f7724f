"""What passes and engines may know of a backend. A leaf: data only, each figure with its source."""

from __future__ import annotations

import numpy as np
from attrs import evolve, field, frozen
from attrs.validators import optional

from sagellm import checks
from sagellm.documents import Document
from sagellm.errors import unknown
from sagellm.schemas import DTYPE_BYTES

CALLS, VERIFY_CALLS = 10, 5
"""Of a layer, and of its attention to trees of guesses more than that."""
INSTANCE_TYPES = ("general", "prefill", "decode", "hybrid", "embedding")


@frozen(kw_only=True)
class Figure:
    """A number about hardware, where it comes from, and whether it was measured on this machine."""

    value: float = field(validator=checks.number())
    unit: str = field(validator=checks.text)
    source: str = field(validator=checks.text)
    verified: bool = field(default=False, validator=checks.flag)


@frozen(kw_only=True)
class CostModel:
    """What work takes on a device: the longer of its arithmetic and its reading and writing, and a start per call.

    The roofline of Williams et al. 2009. The defaults are assumed, of no device in particular.
    """

    flops: dict[str, float] = field(factory=lambda: {"float32": 1e11, "bfloat16": 2e11, "float16": 2e11})
    """Operations a second that large products reach, by dtype."""
    bytes_per_second: float = 3e10
    """That large reads reach."""
    call: float = 1e-5
    """Seconds that a call takes beside its work."""
    narrow: float = 0.65
    """Part of `flops` that products of a few rows reach."""
    source: str = "assumed"
    """Where the figures come from."""

    def seconds(
        self, *, flops: float = 0, moved: float = 0, dtype: str = "float32", calls: float = 1
    ) -> float:
        """Of `calls` calls that together do so many operations and move so many bytes."""
        slowest = min(self.flops.values())
        return max(flops / self.flops.get(dtype, slowest), moved / self.bytes_per_second) + calls * self.call

    def part(self, ranks: int) -> CostModel:
        """Of one rank, where so many share the device."""
        flops = {dtype: value / ranks for dtype, value in self.flops.items()}
        return evolve(self, flops=flops, bytes_per_second=self.bytes_per_second / ranks)

    def product(self, rows: int, inputs: int, outputs: int, dtype: str) -> float:
        """Seconds of [rows, inputs] times [inputs, outputs], the matrix read from memory."""
        size = DTYPE_BYTES[dtype]
        moved = size * (rows * inputs + inputs * outputs + rows * outputs)
        return self.seconds(flops=2 * rows * inputs * outputs, moved=moved, dtype=dtype)


@frozen(kw_only=True)
class StepCost:
    """What a step of one model takes on a device, by the tokens that go through it. Attention is left out."""

    token: float
    """Seconds of arithmetic for each."""
    least: float
    """Seconds to read the weights: fewer tokens take no less."""
    start: float
    """Seconds that the calls take beside their work."""
    verify: float
    """Seconds that the calls take which verify guesses."""

    @classmethod
    def of(cls, costs: CostModel, parameters: int, layers: int, dtype: str) -> StepCost:
        """`parameters` are read once and take part in a product for every token."""
        slowest = min(costs.flops.values())
        return cls(
            token=2 * parameters / costs.flops.get(dtype, slowest),
            least=parameters * DTYPE_BYTES[dtype] / costs.bytes_per_second,
            start=(CALLS * layers + CALLS) * costs.call,
            verify=VERIFY_CALLS * layers * costs.call,
        )

    def seconds(self, tokens):
        """Of a step of so many tokens, or of each of these steps."""
        return np.maximum(tokens * self.token, self.least) + self.start


@frozen(kw_only=True)
class AttentionShape:
    """What attention over cached tokens takes."""

    heads: int
    """Of queries, in one layer."""
    kv_heads: int
    head_dim: int
    layers: int
    """Those that see all tokens; layers with a window are not among them."""
    dtype: str

    def seconds(self, costs: CostModel, queries: int, tokens: int, reads: int) -> float:
        """Of one step in which `queries` rows see `tokens` tokens each, and these are read `reads` times."""
        flops = 4 * self.layers * self.heads * self.head_dim * tokens * queries
        moved = 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype] * tokens * reads
        narrow = costs.narrow if reads == queries else 1.0
        return costs.seconds(flops=flops / narrow, moved=moved, dtype=self.dtype, calls=0)


@frozen(kw_only=True)
class CapabilityDescriptor(Document):
    """What a backend can do."""

    backend: str = field(validator=checks.text)
    """Name of the target: cpu, cuda, ascend, ..."""
    device: str = field(validator=checks.text)
    """torch's device string."""
    dtypes: tuple[str, ...] = field(validator=checks.each(tuple, checks.one_of(DTYPE_BYTES)))
    """Types of weights and activations, best first."""
    kernels: frozenset[str] = field(validator=checks.each(frozenset, checks.text))
    """Operations of the model graph that have an emitted call."""
    kv_dtypes: tuple[str, ...] = field(validator=checks.each(tuple, checks.one_of(DTYPE_BYTES)))
    """Types of keys and values, best first."""
    mixed_kv: bool = field(default=False, validator=checks.flag)
    """Whether kernels read keys and values of another float type than the activations'."""
    block_sizes: tuple[int, ...] = field(validator=checks.each(tuple, checks.whole()))
    """Tokens per KV block, preferred first."""
    any_block_size: bool = field(default=False, validator=checks.flag)
    """Whether the kernels read blocks of every size; `block_sizes` are then the ones to prefer."""
    linear_layouts: dict[str, str] = field(factory=dict, validator=checks.table(checks.text))
    """Weight layout that the backend's linear wants, by dtype; none means plain [out, in]."""
    instance_type: str = field(default="general", validator=checks.one_of(INSTANCE_TYPES))
    """Which work a control plane sends here."""
    max_batch_size: int | None = field(default=None, validator=optional(checks.whole()))
    """Sequences of one step; None: no limit of the backend's own."""
    max_sequence_length: int | None = field(default=None, validator=optional(checks.whole()))
    """Tokens of a sequence, prompt and output; None: no limit of the backend's own."""
    kv_cache_capacity: int | None = field(default=None, validator=optional(checks.whole()))
    """Tokens that the KV cache holds; None before a model is loaded."""
    figures: dict[str, Figure] = field(
        factory=dict, validator=checks.table(checks.instance_of(Figure, "a Figure"))
    )
    """Numbers about the hardware, by name."""
    notes: tuple[str, ...] = field(default=(), validator=checks.each(tuple, checks.text))
    """What else a person should know, such as why a faster kernel is not there."""

    def check_dtype(self, dtype: str) -> None:
        if dtype not in self.dtypes:
            raise unknown(f"dtype for {self.backend}", dtype, self.dtypes)
