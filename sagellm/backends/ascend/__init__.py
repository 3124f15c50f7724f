"""Huawei Ascend, through torch_npu: emitted calls are torch.ops.npu.*, for the chip that is named or found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from sagellm.backends import chips
from sagellm.backends.ascend import codegen, kernels
from sagellm.backends.ascend.columns import AscendRows
from sagellm.backends.ascend.graphs import AscendDecodes
from sagellm.backends.aten import TorchBackend
from sagellm.backends.aten.cache import NHD, NZ
from sagellm.backends.contract import Contract
from sagellm.backends.emit import Line
from sagellm.rows import Rows
from sagellm.target import CapabilityDescriptor


class AscendBackend(TorchBackend):
    name = "ascend"
    device = "npu"

    def __init__(self, chip: str | None = None):
        self.chip = chips.find(self.name, chip or "910B").kind
        self.layout = NZ if self.chip == "310P" else NHD

    @property
    def capability(self) -> CapabilityDescriptor:
        chip = chips.find(self.name, self.chip)
        dtypes = chip.dtypes.value
        return CapabilityDescriptor(
            backend=self.name,
            device=self.device,
            dtypes=dtypes,
            kernels=frozenset(self.kernels()),
            kv_dtypes=(*dtypes, "int8"),
            block_sizes=chip.block_sizes.value.prefer,
            max_batch_size=4096,
            notes=(f"chip {self.chip}",),
        )

    def kernels(self) -> Mapping[str, Line]:
        return codegen.BY_CHIP[self.chip]

    def loads(self) -> Mapping[str, Line]:
        return codegen.LOADS

    @property
    def contract(self) -> Contract:
        from sagellm.backends.ascend.contract import CONTRACT

        return CONTRACT

    def header(self, name: str) -> str:
        return codegen.HEADER.format(name=name, chip=self.chip, device=self.device)

    @cached_property
    def causal_mask(self) -> Tensor:
        return kernels.causal_mask(self.device)

    def captured(self, function: Callable, kinds: tuple[str, ...]) -> Callable:
        """Decodes alone; the attention over NZ caches is not one call whose lengths can be given anew."""
        capturable = kinds == ("decode",) and self.device == "npu" and self.layout == NHD
        if not capturable:
            return function
        return AscendDecodes(
            function,
            torch.npu,
            lambda step, like: AscendRows(step, like.block_size, self.device, self.causal_mask),
        )

    def upload(self, rows: Rows, block_size: int) -> AscendRows:
        return AscendRows(rows, block_size, self.device, self.causal_mask)
