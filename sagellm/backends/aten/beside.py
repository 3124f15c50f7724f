"""Copies of KV blocks to host memory while the device goes on computing: on a stream of their own, ordered by events.

`torch.npu`, `torch.mlu` and `torch.cuda` name streams and events alike, and the vendors' builds of torch are older
than `torch.accelerator`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class CopiesBeside:
    """What a step copies while it computes.

    The copies come after what was written before the step began, not after its forward, which writes none of these
    blocks. The next step, which may hand them out again, comes after the copies. The host waits for neither.
    """

    def __init__(self, device: str, gather: Callable[[np.ndarray], Tensor]):
        """`gather` gives blocks of the cache as [N, ...] on the device."""
        self._device, self._gather = getattr(torch, device), gather
        self._stream = self._device.Stream()
        self._began: Any = None
        """Event: all that was asked of the device before this step."""
        self._copied: Any = None
        """Event: the copies asked for last."""

    def begin_step(self) -> None:
        current = self._device.current_stream()
        if self._copied is not None:
            current.wait_event(self._copied)
        self._began = current.record_event()

    def copy(self, blocks: np.ndarray, room: Tensor, slots: np.ndarray) -> None:
        """N blocks to N slots of pinned host memory."""
        with self._device.stream(self._stream):
            self._stream.wait_event(self._began)
            for slot, values in zip(slots.tolist(), self._gather(blocks).unbind()):
                room[slot].copy_(values, non_blocking=True)
            self._copied = self._stream.record_event()

    def wait(self) -> None:
        """The host waits for the copies: only then may it touch the memory that they go to."""
        if self._copied is not None:
            self._copied.synchronize()
