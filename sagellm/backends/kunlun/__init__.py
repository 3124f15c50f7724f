"""Kunlun XPU, through torch_xmlir, which calls the device cuda.

`xpu` is stock torch. `xpu+kernels` calls kunlun_ops, of which attention and cache are known by call sites alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from sagellm.backends.aten import TorchBackend
from sagellm.backends.aten.cache import HND, NHD
from sagellm.backends.aten.paged import PagedRows
from sagellm.backends.contract import CONFIDENCE, Contract
from sagellm.backends.emit import Line
from sagellm.backends.kunlun import codegen
from sagellm.errors import unknown
from sagellm.rows import Rows
from sagellm.target import CapabilityDescriptor

CHIPS = ("P800",)
HALVES = ("bfloat16", "float16")
STOCK = f"stock torch; kunlun_ops by xpu+kernels (attention and cache with confidence D: {CONFIDENCE['D']})"
VENDOR = f"kunlun_ops: attention and cache with confidence D, {CONFIDENCE['D']}; xpu is stock torch"


class KunlunBackend(TorchBackend):
    name = "kunlun"
    device = "cuda"

    def __init__(self, chip: str | None = None, vendor_kernels: bool = False):
        if chip is not None and chip not in CHIPS:
            raise unknown("Kunlun chip", chip, CHIPS)
        self.chip = chip or "P800"
        self.vendor_kernels = vendor_kernels
        self.layout = HND if vendor_kernels else NHD

    @property
    def capability(self) -> CapabilityDescriptor:
        dtypes = HALVES if self.vendor_kernels else (*HALVES, "float32")
        return CapabilityDescriptor(
            backend=self.name,
            device=self.device,
            dtypes=dtypes,
            kernels=frozenset(self.kernels()),
            kv_dtypes=dtypes,
            block_sizes=(16, 128),
            any_block_size=not self.vendor_kernels,
            notes=(f"chip {self.chip}", VENDOR if self.vendor_kernels else STOCK),
        )

    def kernels(self) -> Mapping[str, Line]:
        return codegen.KERNELS if self.vendor_kernels else codegen.STOCK

    def loads(self) -> Mapping[str, Line]:
        return codegen.LOADS

    @property
    def contract(self) -> Contract:
        from sagellm.backends.kunlun.contract import CONTRACT, STOCK_CONTRACT

        return CONTRACT if self.vendor_kernels else STOCK_CONTRACT

    def header(self, name: str) -> str:
        imports = codegen.VENDOR_IMPORTS if self.vendor_kernels else ""
        return codegen.HEADER.format(name=name, chip=self.chip, device=self.device, imports=imports)

    def upload(self, rows: Rows, block_size: int) -> PagedRows:
        return PagedRows(rows, block_size, self.device)
