"""NVIDIA, in stock torch, with decodes captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from sagellm.backends.aten import TorchBackend
from sagellm.backends.aten.columns import AtenRows
from sagellm.backends.aten.graphs import CapturedDecodes, HeldRows
from sagellm.backends.contract import Contract
from sagellm.backends.cuda import codegen
from sagellm.backends.emit import Line
from sagellm.rows import Rows
from sagellm.target import CapabilityDescriptor

DTYPES = ("bfloat16", "float16", "float32")


class CudaBackend(TorchBackend):
    name = "cuda"
    device = "cuda"

    @property
    def capability(self) -> CapabilityDescriptor:
        return CapabilityDescriptor(
            backend=self.name,
            device=self.device,
            dtypes=DTYPES,
            kernels=frozenset(codegen.KERNELS),
            kv_dtypes=(*DTYPES, "int8"),
            block_sizes=(16, 32, 64, 128),
            any_block_size=True,
            notes=("stock torch; never run on a GPU",),
        )

    def kernels(self) -> Mapping[str, Line]:
        return codegen.KERNELS

    def loads(self) -> Mapping[str, Line]:
        return codegen.LOADS

    @property
    def contract(self) -> Contract:
        return Contract(calls=())

    def header(self, name: str) -> str:
        return codegen.HEADER.format(name=name, device=self.device)

    def captured(self, function: Callable, kinds: tuple[str, ...]) -> Callable:
        if kinds != ("decode",) or self.device != "cuda":
            return function
        return CapturedDecodes(
            function, torch.cuda, lambda step, like: HeldRows(step, like.block_size, self.device)
        )

    def upload(self, rows: Rows, block_size: int) -> AtenRows:
        return AtenRows(rows, block_size, self.device)
