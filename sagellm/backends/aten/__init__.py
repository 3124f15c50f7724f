"""What devices that torch drives have in common: kernels in stock torch, from which a vendor's table starts."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from types import ModuleType

import numpy as np
import torch
from attrs import evolve
from torch import Tensor

from sagellm.backends import chips
from sagellm.backends.aten.cache import NHD, DeviceCache
from sagellm.backends.aten.paged import PagedRows
from sagellm.backends.base import Backend
from sagellm.backends.emit import Line, emit_program
from sagellm.backends.plan import Program
from sagellm.errors import UserError
from sagellm.ir.graph import IRGraph
from sagellm.rows import Rows
from sagellm.schemas import KVCacheSchema
from sagellm.target import CapabilityDescriptor


class TorchBackend(Backend):
    """A backend whose tensors lie on one torch device; a vendor gives its tables, header and columns."""

    device: str
    """torch's device string."""
    layout = NHD
    """Of the KV cache."""
    widened = False
    """Whether the same text runs on float32 in place of half types, as where references stand in for the kernels."""

    @abstractmethod
    def kernels(self) -> Mapping[str, Line]:
        """The kernel table."""

    @abstractmethod
    def loads(self) -> Mapping[str, Line]:
        """What the operations of a weights program become."""

    @abstractmethod
    def header(self, name: str) -> str:
        """First lines of the emitted text."""

    def emit(self, graph: IRGraph, name: str) -> Program:
        if graph.kv_dtype is not None and graph.kv_dtype not in self.capability.kv_dtypes:
            kept = ", ".join(self.capability.kv_dtypes)
            raise UserError(f"kv_dtype {graph.kv_dtype!r} for {self.name}; accepted: {kept}")
        program = emit_program(graph, self.kernels(), self.loads(), self.header(name), name)
        if self.widened:
            return Program(
                name, re.sub(r"\btorch\.b?float16\b", "torch.float32", program.source), program.calls
            )
        return program

    def make_cache(self, schema: KVCacheSchema, blocks: int) -> DeviceCache:
        if self.widened and schema.scale_dtype is None:
            schema = evolve(schema, dtype="float32")
        # int8 is read by stock torch on every device.
        layout = self.layout if schema.scale_dtype is None else NHD
        return DeviceCache(schema, blocks, self.device, layout)

    def put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


class StockOrVendor(TorchBackend):
    """Stock torch by default, the vendor's kernels where they are asked for: of these only call sites are public."""

    default_chip: str
    stock: str
    """A note about the default."""
    vendors: str
    """A note about the vendor's kernels."""
    block_sizes: tuple[int, ...]
    tables: ModuleType
    """The vendor's codegen: HEADER, VENDOR_IMPORTS, STOCK, KERNELS and LOADS."""

    def __init__(self, chip: str | None = None, vendor_kernels: bool = False):
        self.chip = chips.find(self.name, chip or self.default_chip).kind
        self.vendor_kernels = vendor_kernels

    @property
    def capability(self) -> CapabilityDescriptor:
        dtypes = ("bfloat16", "float16") if self.vendor_kernels else ("bfloat16", "float16", "float32")
        return CapabilityDescriptor(
            backend=self.name,
            device=self.device,
            dtypes=dtypes,
            kernels=frozenset(self.kernels()),
            kv_dtypes=dtypes if self.vendor_kernels else (*dtypes, "int8"),
            block_sizes=self.block_sizes,
            any_block_size=not self.vendor_kernels,
            notes=(f"chip {self.chip}", self.vendors if self.vendor_kernels else self.stock),
        )

    def kernels(self) -> Mapping[str, Line]:
        return self.tables.KERNELS if self.vendor_kernels else self.tables.STOCK

    def loads(self) -> Mapping[str, Line]:
        return self.tables.LOADS

    def header(self, name: str) -> str:
        imports = self.tables.VENDOR_IMPORTS if self.vendor_kernels else ""
        return self.tables.HEADER.format(name=name, chip=self.chip, device=self.device, imports=imports)

    def upload(self, rows: Rows, block_size: int) -> PagedRows:
        return PagedRows(rows, block_size, self.device)
