"""Kunlun XPU, through torch_xmlir, which calls the device cuda.

`xpu` is stock torch. `xpu+kernels` calls kunlun_ops, of which attention and cache are known by call sites alone.
"""

from __future__ import annotations

from sagellm.backends.aten import StockOrVendor
from sagellm.backends.aten.cache import HND, NHD
from sagellm.backends.contract import CONFIDENCE, Contract
from sagellm.backends.kunlun import codegen


class KunlunBackend(StockOrVendor):
    name = "kunlun"
    device = "cuda"
    default_chip = "P800"
    stock = (
        f"stock torch; kunlun_ops by xpu+kernels (attention and cache with confidence D: {CONFIDENCE['D']})"
    )
    vendors = f"kunlun_ops: attention and cache with confidence D, {CONFIDENCE['D']}; xpu is stock torch"
    block_sizes = (16, 128)
    tables = codegen

    def __init__(self, chip: str | None = None, vendor_kernels: bool = False):
        super().__init__(chip, vendor_kernels)
        self.layout = HND if vendor_kernels else NHD

    @property
    def contract(self) -> Contract:
        from sagellm.backends.kunlun.contract import CONTRACT, STOCK_CONTRACT

        return CONTRACT if self.vendor_kernels else STOCK_CONTRACT
