"""Whether blocks that leave the device go to host memory: a copy there and back beside computing them again."""

from __future__ import annotations

RECENT = 0.1
"""Weight of the newest measurement in the running means."""


class SwapOrRecompute:
    """Seconds a block of either way back, from what both took lately; before that, from the cost model."""

    def __init__(self, copy: float, compute: float):
        """`copy` of one block one way, `compute` of one block's tokens; seconds, predicted."""
        self.copy, self.compute = copy, compute
        self._warm = False

    def copied(self, blocks: int, seconds: float) -> None:
        """The first copy also allocates, so it says nothing."""
        if self._warm:
            self.copy += RECENT * (seconds / blocks - self.copy)
        self._warm = True

    def computed(self, blocks: float, seconds: float) -> None:
        self.compute += RECENT * (seconds / blocks - self.compute)

    @property
    def swap(self) -> bool:
        return 2 * self.copy < self.compute
