"""Which idle blocks leave first: a policy is a small class over the columns of `Blocks`."""

from __future__ import annotations

from importlib import import_module

import numpy as np

from sagellm.errors import unknown
from sagellm.kv.blocks import Blocks, times


class Policy:
    """Says what idle blocks are worth; those of least worth leave first. A policy may keep a number for each block in
    the column `mark`, which is 0 when a block is new.
    """

    name = ""
    exact = False
    """Rank anew for each block that leaves, instead of some at once."""

    def __init__(self, blocks: Blocks):
        self.blocks = blocks
        for records in (blocks.records, blocks.gone):
            records["mark"] = 0

    def before_use(self, blocks: np.ndarray, waited: np.ndarray) -> None:
        """Blocks are used again, so many ticks of the clock after their last use; the columns still tell of that."""

    def after_use(self, blocks: np.ndarray) -> None:
        """All blocks of a sequence that ended, from its beginning; the columns tell of this use."""

    def evicted(self, blocks: np.ndarray) -> None:
        """These leave."""

    def lost(self, records: np.ndarray) -> None:
        """Nothing more will be known of these, which left long ago."""

    def worth(self, blocks: np.ndarray) -> np.ndarray:
        """Any number for each of these idle blocks."""
        raise TypeError(f"policy {self.name} ranks nothing")

    def why(self, record: np.void, clock: int) -> str:
        """Why the block of this record left when the clock stood there, as a user reads it."""
        return f"{times(int(record['uses']))}, last {clock - record['last_use']} blocks before"


class LRU(Policy):
    """The least recently used block leaves first."""

    name = "lru"

    def worth(self, blocks: np.ndarray) -> np.ndarray:
        return self.blocks["last_use"][blocks].astype(float)


def then_recent(blocks: Blocks, chosen: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Order by whole numbers, and the least recently used first where they are equal."""
    return value + blocks["last_use"][chosen] / (blocks.clock + 1.0)


class LFU(Policy):
    """The block used least often leaves first."""

    name = "lfu"

    def worth(self, blocks: np.ndarray) -> np.ndarray:
        return then_recent(self.blocks, blocks, self.blocks["uses"][blocks])


class AgedLFU(Policy):
    """LFU with dynamic aging: a use counts from the worth of what left last, so that what was hot once may leave
    (LFU-DA; Arlitt et al. 2000). `mark` is the worth."""

    name = "lfu-aging"

    def __init__(self, blocks: Blocks):
        super().__init__(blocks)
        self.age = 0

    def after_use(self, blocks: np.ndarray) -> None:
        self.blocks["mark"][blocks] = self.age + self.blocks["uses"][blocks]

    def evicted(self, blocks: np.ndarray) -> None:
        self.age = max(self.age, int(self.blocks["mark"][blocks].max()))

    def worth(self, blocks: np.ndarray) -> np.ndarray:
        return then_recent(self.blocks, blocks, self.blocks["mark"][blocks])


class SegmentedLRU(Policy):
    """Blocks used again are protected, as many as PROTECTED of the pool, the least recent of them no more; the others
    leave first (Karedla et al. 1994)."""

    name = "slru"
    PROTECTED = 0.8

    def worth(self, blocks: np.ndarray) -> np.ndarray:
        last = self.blocks["last_use"][blocks].astype(float)
        again = np.flatnonzero(self.blocks["uses"][blocks] > 1)
        room = int(self.PROTECTED * len(self.blocks.records))
        protected = again[np.argsort(-last[again], kind="stable")[:room]]
        last[protected] += self.blocks.clock
        return last


class S3FIFO(Policy):
    """Three queues (Yang et al. 2023): blocks enter a small one; those not used again leave it first, others, and
    those that came back soon, are in the main one, where each use (3 at most) buys another round. `mark` counts the
    uses that are not spent; a block that gets another round enters anew.
    """

    name = "s3-fifo"
    SMALL = 0.1

    def after_use(self, blocks: np.ndarray) -> None:
        mark = self.blocks["mark"]
        mark[blocks] = np.minimum(mark[blocks] + (self.blocks["uses"][blocks] > 1), 3)

    def worth(self, blocks: np.ndarray) -> np.ndarray:
        b, entered = self.blocks, self.blocks["entered"][blocks].astype(float)
        small = (b["mark"][blocks] == 0) & ~b["again"][blocks]
        rounds = entered + b["mark"][blocks] * float(len(b.records))
        if np.count_nonzero(small) <= self.SMALL * len(b.records):
            return rounds
        return np.where(small, entered, rounds + b.clock)


class TailLRU(Policy):
    """LRU that first gives up what does not lengthen the slowest answers: the last blocks of a sequence, as long as its
    next turn would still compute no more than twice what sequences compute on average (T-LRU; Zhang et al. 2025).
    """

    name = "t-lru"

    def __init__(self, blocks: Blocks):
        super().__init__(blocks)
        self.computed = 0.0
        """Running mean of a sequence's new blocks."""

    def after_use(self, blocks: np.ndarray) -> None:
        new = np.count_nonzero(self.blocks["uses"][blocks] == 1)
        self.computed += 0.01 * (new - self.computed) if self.computed else new

    def worth(self, blocks: np.ndarray) -> np.ndarray:
        b = self.blocks
        behind = b["span"][blocks] - b["depth"][blocks]
        harmless = behind + self.computed <= 2 * self.computed
        return b["last_use"][blocks] - harmless * (b.clock + 1.0)


class PriorityTTL(Policy):
    """Blocks that nobody used for TTL pools' worth of blocks leave first, then those of the least urgent requests, the
    least recently used first."""

    name = "priority"
    TTL = 8

    def worth(self, blocks: np.ndarray) -> np.ndarray:
        b = self.blocks
        old = b.clock - b["last_use"][blocks] > self.TTL * len(b.records)
        urgency = np.where(old, -(2.0**32), -b["priority"][blocks].astype(float))
        return then_recent(b, blocks, urgency)


POLICIES = {
    kind.name: f"{__name__}:{kind.__name__}"
    for kind in (LRU, LFU, AgedLFU, SegmentedLRU, S3FIFO, TailLRU, PriorityTTL)
} | {"lifetime": "sagellm.kv.lifetime:Lifetime"}


def policy(name: str) -> type[Policy]:
    """The policy class of this name."""
    if name not in POLICIES:
        raise unknown("policy", name, POLICIES)
    module, _, attribute = POLICIES[name].partition(":")
    return getattr(import_module(module), attribute)
