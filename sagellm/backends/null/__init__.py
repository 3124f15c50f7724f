"""A device that computes nothing: every operation is a call that gives back what it got.

What is left of a step is the engine's own work. It is for benchmarks of that work and for tests of the scheduler;
its tokens mean nothing.
"""

from __future__ import annotations

from sagellm.backends.base import Backend
from sagellm.backends.emit import emit_program
from sagellm.backends.null.codegen import HEADER, KERNELS, LOADS
from sagellm.backends.null.kernels import NullCache
from sagellm.backends.plan import Program
from sagellm.ir.graph import IRGraph
from sagellm.rows import Rows
from sagellm.schemas import FLOATS, KVCacheSchema
from sagellm.target import CapabilityDescriptor


class NullBackend(Backend):
    name = "null"
    available = False
    """Never what `auto` means."""

    @property
    def capability(self) -> CapabilityDescriptor:
        return CapabilityDescriptor(
            backend=self.name,
            device="cpu",
            dtypes=tuple(FLOATS),
            kernels=frozenset(KERNELS),
            kv_dtypes=tuple(FLOATS),
            block_sizes=(16,),
            any_block_size=True,
            notes=("computes nothing: for benchmarks of the engine's own work",),
        )

    def emit(self, graph: IRGraph, name: str) -> Program:
        return emit_program(graph, KERNELS, LOADS, HEADER.format(name=name), name)

    def make_cache(self, schema: KVCacheSchema, blocks: int) -> NullCache:
        return NullCache(schema)

    def upload(self, rows: Rows, block_size: int) -> Rows:
        return rows
