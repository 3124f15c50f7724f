"""What a pass may see and settle of the KV cache."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from sagellm.batch import Batch


class KVView(Protocol):
    """The engine's KV cache, as `kv-eviction-placement` sees it."""

    @property
    def copies_pay(self) -> bool:
        """Is there host memory, and does a copy cost less than computing a block again?"""
        ...

    def retain(self, name: str, *, offload: bool) -> None:
        """Keep blocks that nobody holds until room is needed; this policy says which of them leave first."""
        ...

    def coming(self, batch: Batch) -> int:
        """Blocks of the sequence that waits first that are in host memory, as many as there is room for in this step
        without one leaving that it needs."""
        ...

    def shortage(self, batch: Batch) -> int:
        """Blocks that must leave for this step, and for what comes in it ahead."""
        ...

    def first_to_leave(self, count: int) -> np.ndarray:
        """At most `count` idle blocks, in the order in which they leave."""
        ...
