"""Hygon DCU, through its build of torch, which calls the device cuda.

`dcu` is stock torch. `dcu+kernels` calls lightop and flash_attn, whose signatures are known by call sites alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from sagellm.backends.aten import TorchBackend
from sagellm.backends.aten.paged import PagedRows
from sagellm.backends.contract import CONFIDENCE, Contract
from sagellm.backends.emit import Line
from sagellm.backends.hygon import codegen
from sagellm.errors import unknown
from sagellm.rows import Rows
from sagellm.target import CapabilityDescriptor

CHIPS = ("K100_AI", "BW1000", "BW1100")
HALVES = ("bfloat16", "float16")
STOCK = f"stock torch; lightop and flash_attn by dcu+kernels (confidence D: {CONFIDENCE['D']})"
VENDOR = f"lightop and flash_attn: confidence D, {CONFIDENCE['D']}; dcu is stock torch"


class HygonBackend(TorchBackend):
    name = "hygon"
    device = "cuda"

    def __init__(self, chip: str | None = None, vendor_kernels: bool = False):
        if chip is not None and chip not in CHIPS:
            raise unknown("Hygon chip", chip, CHIPS)
        self.chip = chip or "BW1000"
        self.vendor_kernels = vendor_kernels

    @property
    def capability(self) -> CapabilityDescriptor:
        dtypes = HALVES if self.vendor_kernels else (*HALVES, "float32")
        return CapabilityDescriptor(
            backend=self.name,
            device=self.device,
            dtypes=dtypes,
            kernels=frozenset(self.kernels()),
            kv_dtypes=dtypes,
            block_sizes=(64, 128),
            any_block_size=not self.vendor_kernels,
            notes=(f"chip {self.chip}", VENDOR if self.vendor_kernels else STOCK),
        )

    def kernels(self) -> Mapping[str, Line]:
        return codegen.KERNELS if self.vendor_kernels else codegen.STOCK

    def loads(self) -> Mapping[str, Line]:
        return codegen.LOADS

    @property
    def contract(self) -> Contract:
        from sagellm.backends.hygon.contract import CONTRACT, STOCK_CONTRACT

        return CONTRACT if self.vendor_kernels else STOCK_CONTRACT

    def header(self, name: str) -> str:
        imports = codegen.VENDOR_IMPORTS if self.vendor_kernels else ""
        return codegen.HEADER.format(name=name, chip=self.chip, device=self.device, imports=imports)

    def upload(self, rows: Rows, block_size: int) -> PagedRows:
        return PagedRows(rows, block_size, self.device)
