"""What devices that torch drives have in common: kernels in stock torch, from which a vendor's table starts."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from attrs import evolve
from torch import Tensor

from sagellm.backends.aten.cache import NHD, DeviceCache
from sagellm.backends.base import Backend
from sagellm.backends.emit import Line, emit_program
from sagellm.backends.plan import Program
from sagellm.ir.graph import IRGraph
from sagellm.schemas import KVCacheSchema


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
        program = emit_program(graph, self.kernels(), self.loads(), self.header(name), name)
        if self.widened:
            return Program(
                name, re.sub(r"\btorch\.b?float16\b", "torch.float32", program.source), program.calls
            )
        return program

    def make_cache(self, schema: KVCacheSchema, blocks: int) -> DeviceCache:
        if self.widened:
            schema = evolve(schema, dtype="float32")
        return DeviceCache(schema, blocks, self.device, self.layout)

    def put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)
