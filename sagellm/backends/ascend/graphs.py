"""Captured graphs of steps that only decode, with new lengths for the attention."""

from __future__ import annotations

from typing import Any

from sagellm.backends.ascend.columns import AscendRows
from sagellm.backends.aten.graphs import CapturedDecodes


class AscendDecodes(CapturedDecodes):
    """The attention's sequence lengths are host integers, frozen at capture. With `auto_dispatch_capture` torch_npu
    notes these calls, and `update` issues them again with other lengths; the graph waits for that."""

    graph = "NPUGraph"
    options = {"auto_dispatch_capture": True}

    def launch(self, graph: Any, held: AscendRows) -> None:
        graph.replay()
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": held.kv_lengths}])
