"""Captured graphs of steps that only decode: launched as a whole, over columns whose memory stays."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from attrs import evolve
from torch import Tensor

from sagellm.backends.aten.columns import AtenRows
from sagellm.rows import Rows

LARGEST = 128
"""Rows of the largest graph; larger steps keep the device busy without."""


class Held(Protocol):
    """Columns that a graph reads where they lie."""

    def fill(self, rows: Rows) -> None:
        """Other rows of the same shapes, in the memory of these."""


class HeldRows(AtenRows):
    """Columns of decodes for kernels in stock torch; what these derive from them is part of the graph."""

    COLUMNS = ("tokens", "positions", "lengths", "slots", "outputs", "decode_blocks", "decode_lengths")

    def __init__(self, rows: Rows, block_size: int, device: str):
        super().__init__(rows, block_size, device)
        self.fill(rows)  # no column may come to the device during the capture

    def fill(self, rows: Rows) -> None:
        self._made.clear()
        for name in self.COLUMNS:
            column = torch.from_numpy(np.ascontiguousarray(getattr(rows, name)))
            getattr(self, name).copy_(column, non_blocking=True)


class CapturedDecodes:
    """A function of the model over decodes, captured on the first step of each size: rows and the longest block table,
    both rounded up to powers of two."""

    graph = "CUDAGraph"
    """torch's name of a graph on this device."""
    options: dict[str, Any] = {}
    """Of a capture."""

    def __init__(
        self, function: Callable[..., Tensor], device: ModuleType, hold: Callable[[Rows, Any], Held]
    ):
        """`device` is torch's module of it; `hold` gives columns for padded rows, like those of a step."""
        self._function, self._device, self._hold = function, device, hold
        self._graphs: dict[tuple[int, int], tuple[Any, Held, Tensor]] = {}
        self._pool: Any = None

    def __call__(self, weights: Any, cache: Any, rows: Any) -> Tensor:
        count, blocks = rows.rows.decode_blocks.shape
        size, width = (max(2, 1 << (n - 1).bit_length()) for n in (count, blocks))
        if size > LARGEST or size - count > rows.block_size:  # padding has the slots of one block to write to
            return self._function(weights, cache, rows)
        step = padded(rows.rows, size, width)
        if (size, width) not in self._graphs:
            self._graphs[size, width] = self._capture(weights, cache, step, rows)
        graph, held, logits = self._graphs[size, width]
        held.fill(step)
        self.launch(graph, held)
        return logits[:count]

    def launch(self, graph: Any, held: Any) -> None:
        graph.replay()

    def _capture(self, weights: Any, cache: Any, step: Rows, rows: Any) -> tuple[Any, Held, Tensor]:
        """The first run, outside, has the libraries set up what they make once."""
        held = self._hold(step, rows)
        self._function(weights, cache, held)
        held.fill(step)
        self._device.synchronize()
        if self._pool is None:
            self._pool = self._device.graph_pool_handle()
        graph = getattr(self._device, self.graph)()
        with self._device.graph(graph, pool=self._pool, **self.options):
            logits = self._function(weights, cache, held)
        return graph, held, logits


def padded(rows: Rows, size: int, width: int) -> Rows:
    """Decodes filled up to `size`, their block tables to `width`, by sequences of one token in block 0, which is
    nobody's; they write into slots of their own there."""
    more = size - len(rows.tokens)
    wider = ((0, more), (0, width - rows.decode_blocks.shape[1]))
    return evolve(
        rows,
        tokens=np.pad(rows.tokens, (0, more)),
        positions=np.pad(rows.positions, (0, more)),
        lengths=np.pad(rows.lengths, (0, more), constant_values=1),
        slots=np.concatenate([rows.slots, np.arange(more)]),
        outputs=np.arange(size),
        decode_blocks=np.pad(rows.decode_blocks, wider),
        decode_lengths=np.pad(rows.decode_lengths, (0, more), constant_values=1),
    )
