"""Which KV blocks are free, who holds the others, and which of those nobody holds are worth keeping."""

from __future__ import annotations

import numpy as np

from sagellm.batch import Columns
from sagellm.rows import aliased_blocks

NO_BLOCKS = np.zeros(0, np.int32)


class BlockPool:
    """Reference counts over `count` blocks; block 0 is padding and never handed out.

    A block that nobody holds is free, or idle: the prefix index knows what is in it, until it is dropped.
    """

    def __init__(self, count: int):
        self.references = np.zeros(count, np.int32)
        self.references[0] = 1
        self.indexed = np.zeros(count, bool)
        self.idle = 0
        self._free = np.arange(count - 1, 0, -1, dtype=np.int32)
        self._top = count - 1

    @property
    def total(self) -> int:
        return len(self.references) - 1

    @property
    def free(self) -> int:
        return self._top

    @property
    def available(self) -> int:
        """Blocks that can be had, if need be by dropping idle ones."""
        return self._top + self.idle

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.total - self.available

    def take(self, count: int) -> np.ndarray:
        """This many free blocks, each held once."""
        if count > self._top:
            raise MemoryError(f"{count} KV blocks wanted, {self._top} of {self.total} are free")
        self._top -= count
        blocks = self._free[self._top : self._top + count].copy()
        self.references[blocks] = 1
        return blocks

    def hold(self, blocks: np.ndarray) -> None:
        """One more holder for each of these different blocks."""
        self.idle -= int(np.count_nonzero(self.references[blocks] == 0))
        self.references[blocks] += 1

    def release(self, blocks: np.ndarray) -> np.ndarray:
        """One holder less for each of these different blocks; returns those that became idle."""
        self.references[blocks] -= 1
        left = blocks[self.references[blocks] == 0]
        known = self.indexed[left]
        self._put_back(left[~known])
        idle = left[known]
        self.idle += len(idle)
        return idle

    def drop(self, blocks: np.ndarray) -> None:
        """Idle blocks become free."""
        self.indexed[blocks] = False
        self.idle -= len(blocks)
        self._put_back(blocks)

    def _put_back(self, blocks: np.ndarray) -> None:
        self._free[self._top : self._top + len(blocks)] = blocks
        self._top += len(blocks)

    def extend(self, columns: Columns, rows: np.ndarray) -> np.ndarray:
        """Give each row the blocks that its new tokens need; returns those."""
        c = columns
        needed = -(-(c.context[rows] + c.new[rows] + c.drafted[rows]) // c.block_size)
        wanted = needed - c.owned[rows]
        growing = wanted > 0
        if not growing.any():
            return NO_BLOCKS
        rows, needed, wanted = rows[growing], needed[growing], wanted[growing]
        blocks = self.take(int(wanted.sum()))
        sequences = np.repeat(rows, wanted)
        within = np.arange(len(blocks)) - np.repeat(np.cumsum(wanted) - wanted, wanted)
        c.blocks[sequences, c.owned[sequences] + within] = blocks
        c.owned[rows] = needed
        return blocks

    def shrink(self, columns: Columns, rows: np.ndarray, lengths: np.ndarray) -> None:
        """Take back the blocks that each row holds behind its first `lengths` tokens."""
        c, keep = columns, -(-lengths // columns.block_size)
        for at in np.flatnonzero(c.owned[rows] > keep).tolist():
            row, kept = int(rows[at]), int(keep[at])
            self.release(c.blocks[row, kept : c.owned[row]].copy())
            c.blocks[row, kept : c.owned[row]] = 0
            c.owned[row] = kept

    def extend_shared(self, columns: Columns, rows: np.ndarray) -> np.ndarray:
        """As `extend`, for rows of which some follow a leader: they take over its full blocks, leaders first."""
        c, waiting = columns, dict.fromkeys(rows.tolist())
        taken = [NO_BLOCKS]
        low, high = aliased_blocks(c, rows)
        aliased = dict(zip(rows.tolist(), zip(low.tolist(), high.tolist())))

        def place(row: int) -> None:
            waiting.pop(row)
            leader = int(c.leader[row])
            if leader in waiting:
                place(leader)
            low, high = aliased[row]
            if leader >= 0 and high > max(low, c.owned[row]):
                c.blocks[row, low:high] = c.blocks[leader, low:high]
                self.hold(c.blocks[row, low:high])
                c.owned[row] = high
            taken.append(self.extend(c, np.array([row])))

        while waiting:
            place(next(iter(waiting)))
        return np.concatenate(taken)
