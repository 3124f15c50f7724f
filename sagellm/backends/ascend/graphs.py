"""Captured graphs of steps that only decode: launched as a whole, with new lengths for the attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sagellm.backends.ascend.columns import AscendRows, padded

LARGEST = 128
"""Rows of the largest graph: as many as a KV block has slots for the padding to write to."""


class CapturedDecodes:
    """A function of the model over decodes, captured on the first step of each size.

    The attention's sequence lengths are host integers, frozen at capture. With `auto_dispatch_capture` torch_npu notes
    these calls, and `update` issues them again with other lengths; the graph waits for that.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self._function = function
        self._graphs: dict[tuple[int, int], tuple[Any, AscendRows, Tensor]] = {}
        self._pool: Any = None

    def __call__(self, weights: Any, cache: Any, rows: AscendRows) -> Tensor:
        count, blocks = rows.rows.decode_blocks.shape
        size, width = (1 << (n - 1).bit_length() for n in (count, blocks))
        if size > LARGEST:
            return self._function(weights, cache, rows)
        step = padded(rows.rows, size, width)
        if (size, width) not in self._graphs:
            held = AscendRows(step, rows.block_size, rows.tokens.device, rows.causal_mask)
            self._graphs[size, width] = self._capture(weights, cache, held)
        graph, held, logits = self._graphs[size, width]
        held.fill(step)
        graph.replay()
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": held.kv_lengths}])
        return logits[:count]

    def _capture(self, weights: Any, cache: Any, rows: AscendRows) -> tuple[Any, AscendRows, Tensor]:
        """The first run, outside, has the libraries set up what they make once."""
        self._function(weights, cache, rows)
        torch.npu.synchronize()
        if self._pool is None:
            self._pool = torch.npu.graph_pool_handle()
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph, pool=self._pool, auto_dispatch_capture=True):
            logits = self._function(weights, cache, rows)
        return graph, rows, logits
