"""Captured graphs of steps that only decode, with new lengths for the attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sagellm.backends.ascend.columns import AscendRows
from sagellm.backends.aten.graphs import CapturedDecodes


class AscendDecodes(CapturedDecodes):
    """The attention's sequence lengths are host integers, frozen at capture. With `auto_dispatch_capture` torch_npu
    notes these calls, and `update` issues them again with other lengths; the graph waits for that."""

    graph = "NPUGraph"
    options = {"auto_dispatch_capture": True}

    def __call__(self, weights: Any, cache: Any, rows: AscendRows) -> Tensor:
        if cache[0][0].dtype is torch.int8:  # read by stock torch, whose columns are made for each step
            return self._function(weights, cache, rows)
        return super().__call__(weights, cache, rows)

    def launch(self, graph: Any, held: AscendRows) -> None:
        graph.replay()
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": held.kv_lengths}])
