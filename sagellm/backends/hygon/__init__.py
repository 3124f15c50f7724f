"""Hygon DCU, through its build of torch, which calls the device cuda.

`dcu` is stock torch. `dcu+kernels` calls lightop and flash_attn, whose signatures are known by call sites alone.
"""

from __future__ import annotations

from sagellm.backends.aten import StockOrVendor
from sagellm.backends.contract import CONFIDENCE, Contract
from sagellm.backends.hygon import codegen


class HygonBackend(StockOrVendor):
    name = "hygon"
    device = "cuda"
    default_chip = "BW1000"
    stock = f"stock torch; lightop and flash_attn by dcu+kernels (confidence D: {CONFIDENCE['D']})"
    vendors = f"lightop and flash_attn: confidence D, {CONFIDENCE['D']}; dcu is stock torch"
    block_sizes = (64, 128)
    tables = codegen

    @property
    def contract(self) -> Contract:
        from sagellm.backends.hygon.contract import CONTRACT, STOCK_CONTRACT

        return CONTRACT if self.vendor_kernels else STOCK_CONTRACT
