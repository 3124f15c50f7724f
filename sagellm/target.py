"""What passes may know of a backend. A leaf: data only, each figure with its source."""

from __future__ import annotations

from attrs import field, frozen

from sagellm.errors import unknown


@frozen(kw_only=True)
class Figure:
    """A number about hardware, where it comes from, and whether it was measured on this machine."""

    value: float
    unit: str
    source: str
    verified: bool = False


@frozen(kw_only=True)
class CapabilityDescriptor:
    """What a backend can do."""

    backend: str
    """Name of the target: cpu, cuda, ascend, ..."""
    device: str
    """torch's device string."""
    dtypes: tuple[str, ...]
    """Types of weights and activations, best first."""
    kernels: frozenset[str]
    """Operations of the model graph that have an emitted call."""
    kv_dtypes: tuple[str, ...]
    block_sizes: tuple[int, ...]
    """Tokens per KV block, preferred first."""
    linear_layouts: dict[str, str] = field(factory=dict)
    """Weight layout that the backend's linear wants, by dtype; none means plain [out, in]."""
    figures: dict[str, Figure] = field(factory=dict)
    notes: tuple[str, ...] = ()
    """What else a person should know, such as why a faster kernel is not there."""

    def check_dtype(self, dtype: str) -> None:
        if dtype not in self.dtypes:
            raise unknown(f"dtype for {self.backend}", dtype, self.dtypes)
