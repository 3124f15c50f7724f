"""The embedded default: any CPU, through stock torch."""

from __future__ import annotations

import torch

from sagellm.backends.aten.cache import DeviceCache
from sagellm.backends.aten.columns import AtenRows
from sagellm.backends.base import Backend
from sagellm.backends.cpu import native
from sagellm.backends.cpu.codegen import HEADER, KERNELS, LOADS, NATIVE_DTYPES
from sagellm.backends.cpu.packing import packs
from sagellm.backends.emit import emit_program
from sagellm.backends.plan import Program
from sagellm.ir.graph import IRGraph
from sagellm.rows import Rows
from sagellm.schemas import KVCacheSchema
from sagellm.target import CapabilityDescriptor, CostModel

WITH_AVX512 = CostModel(
    flops={"float32": 1.3e11, "bfloat16": 2.5e11, "float16": 5e10},
    bytes_per_second=3.1e10,
    call=1e-5,
    source="two cores of a Zen 4 server, docs/performance.md",
)
WITHOUT_AVX512 = CostModel(
    flops={"float32": 7e10, "bfloat16": 4.8e10, "float16": 2e10},
    bytes_per_second=2.4e10,
    call=1e-5,
    source="two cores of a Zen 3 server, docs/performance.md",
)


class CpuBackend(Backend):
    name = "cpu"

    @property
    def capability(self) -> CapabilityDescriptor:
        return CapabilityDescriptor(
            backend=self.name,
            device="cpu",
            dtypes=("bfloat16", "float32", "float16"),
            kernels=frozenset(KERNELS),
            kv_dtypes=("bfloat16", "float32", "float16", "int8"),
            block_sizes=(16, 32, 64, 128),
            any_block_size=True,
            linear_layouts=self._layouts(),
            notes=(f"native kernels: {native.unavailable() or 'built for this machine'}",),
        )

    @staticmethod
    def _layouts() -> dict[str, str]:
        """oneDNN's where it packs bfloat16, as its kernels then use the processor's widest vectors; else panels."""
        if not packs(torch.bfloat16) and native.unavailable() is None:
            return dict.fromkeys(NATIVE_DTYPES, "panels")
        return {dtype: "onednn" for dtype in NATIVE_DTYPES if packs(getattr(torch, dtype))}

    @property
    def costs(self) -> CostModel:
        return WITH_AVX512 if packs(torch.bfloat16) else WITHOUT_AVX512

    def emit(self, graph: IRGraph, name: str) -> Program:
        return emit_program(graph, KERNELS, LOADS, HEADER.format(name=name), name)

    def make_cache(self, schema: KVCacheSchema, blocks: int) -> DeviceCache:
        return DeviceCache(schema, blocks)

    def upload(self, rows: Rows, block_size: int) -> AtenRows:
        return AtenRows(rows, block_size)
