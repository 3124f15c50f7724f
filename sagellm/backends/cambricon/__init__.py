"""Cambricon MLU, through torch_mlu and torch_mlu_ops: emitted calls are `tmo.*`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sagellm.backends import chips
from sagellm.backends.aten import TorchBackend
from sagellm.backends.aten.cache import HND
from sagellm.backends.aten.paged import PagedRows
from sagellm.backends.cambricon import codegen
from sagellm.backends.contract import CONFIDENCE, Contract
from sagellm.backends.emit import Line
from sagellm.rows import Rows
from sagellm.target import CapabilityDescriptor

HALVES = ("bfloat16", "float16")


class CambriconBackend(TorchBackend):
    name = "cambricon"
    device = "mlu"
    layout = HND

    def __init__(self, chip: str | None = None):
        """The chip with or without MLU before its number."""
        self.chip = chips.find(self.name, "MLU" + (chip or "590").removeprefix("MLU")).kind

    @property
    def capability(self) -> CapabilityDescriptor:
        return CapabilityDescriptor(
            backend=self.name,
            device=self.device,
            dtypes=HALVES,
            kernels=frozenset(self.kernels()),
            kv_dtypes=HALVES,
            block_sizes=(16,),
            notes=(f"chip {self.chip}", f"torch_mlu_ops: confidence C, {CONFIDENCE['C']}"),
        )

    def kernels(self) -> Mapping[str, Line]:
        return codegen.KERNELS

    def loads(self) -> Mapping[str, Line]:
        return codegen.LOADS

    @property
    def contract(self) -> Contract:
        from sagellm.backends.cambricon.contract import CONTRACT

        return CONTRACT

    def header(self, name: str) -> str:
        return codegen.HEADER.format(name=name, chip=self.chip, device=self.device)

    def upload(self, rows: Rows, block_size: int) -> PagedRows:
        return PagedRows(rows, block_size, self.device, slots=np.int32)
