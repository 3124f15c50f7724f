"""The embedded default: any CPU, through stock torch."""

from __future__ import annotations

import torch

from sagellm.backends.base import Backend
from sagellm.backends.cpu import native
from sagellm.backends.cpu.codegen import HEADER, KERNELS, LOADS
from sagellm.backends.cpu.columns import CpuRows
from sagellm.backends.cpu.kernels import CpuCache, packs
from sagellm.backends.emit import emit_program
from sagellm.backends.plan import Program
from sagellm.ir.graph import IRGraph
from sagellm.rows import Rows
from sagellm.schemas import KVCacheSchema
from sagellm.target import CapabilityDescriptor, CostModel


class CpuBackend(Backend):
    name = "cpu"

    @property
    def capability(self) -> CapabilityDescriptor:
        packed = [dtype for dtype in ("bfloat16", "float32") if packs(getattr(torch, dtype))]
        return CapabilityDescriptor(
            backend=self.name,
            device="cpu",
            dtypes=("bfloat16", "float32", "float16"),
            kernels=frozenset(KERNELS),
            kv_dtypes=("bfloat16", "float32", "float16"),
            block_sizes=(16, 32, 64, 128),
            any_block_size=True,
            linear_layouts=dict.fromkeys(packed, "onednn"),
            notes=(f"native kernels: {native.unavailable() or 'built for this machine'}",),
        )

    @property
    def costs(self) -> CostModel:
        return CostModel(
            flops={"float32": 1.3e11, "bfloat16": 2.5e11, "float16": 5e10},
            bytes_per_second=3.1e10,
            call=1e-5,
            narrow=0.65,
            source="two cores of a Zen 4 server, docs/performance.md",
        )

    def emit(self, graph: IRGraph, name: str) -> Program:
        return emit_program(graph, KERNELS, LOADS, HEADER.format(name=name), name)

    def make_cache(self, schema: KVCacheSchema, blocks: int) -> CpuCache:
        return CpuCache(schema, blocks)

    def upload(self, rows: Rows, block_size: int) -> CpuRows:
        return CpuRows(rows, block_size)
