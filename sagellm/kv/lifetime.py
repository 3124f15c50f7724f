"""Keeps the blocks that promise most uses for the room they take, by what was seen of blocks like them."""

from __future__ import annotations

import numpy as np

from sagellm.kv.blocks import Blocks
from sagellm.kv.policies import Policy

BINS = 60
PER_OCTAVE = 3
EDGES = np.concatenate([[0.0], 4.0 * 2.0 ** (np.arange(BINS) / PER_OCTAVE)])
"""Ages in blocks that entered meanwhile: bin i begins at EDGES[i]."""
USES = np.array([0, 0, 1, 2, 2, 2, 2, 2, 3])
CLASSES = 6 * 3 * 4 * 2
TRUST = 20.0
"""So many blocks' worth of what is seen of all classes counts as seen of each."""
KEEP = 0.98
"""Of what was seen, weight that stays with each estimate."""
ESTIMATE_EVERY = 4096


class Lifetime(Policy):
    """Predicts when blocks are used again, and keeps those with the most uses to be expected for the time held.

    Blocks fall into classes by what the last sequence with them was like: how often its conversation had gone on, how
    long it was, how often the block had been used, and whether it was the sequence's last block. For each class, uses
    at each age and survival to each age are counted as they happen, also of blocks that left (Kaplan and Meier 1958:
    those of which nothing was seen yet count up to their age). The worth of a block at age a is the greatest ratio,
    over all later ages b, of P(used before b) and E[time held until its use or b]: the index of Gittins (1979), which
    for one age b is the hit density of LHD (Beckmann et al. 2018). So a block whose use is near stays before a fresh
    one whose use is far, and one whose time has passed leaves.
    """

    name = "lifetime"

    def __init__(self, blocks: Blocks):
        super().__init__(blocks)
        for records in (blocks.records, blocks.gone):
            records["mark"] = classes(records)
        self.used = np.zeros((CLASSES, BINS))
        self.censored = np.zeros((CLASSES, BINS))
        self.table = np.zeros((CLASSES, BINS))
        self._next = 0

    def before_use(self, blocks: np.ndarray, waited: np.ndarray) -> None:
        np.add.at(self.used, (self.blocks["mark"][blocks], ages(waited)), 1)

    def after_use(self, blocks: np.ndarray) -> None:
        records = self.blocks.records[blocks]
        self.blocks["mark"][blocks] = classes(records)

    def lost(self, records: np.ndarray) -> None:
        age = ages(self.blocks.clock - records["last_use"])
        np.add.at(self.censored, (records["mark"], age), 1)

    def worth(self, blocks: np.ndarray) -> np.ndarray:
        clock = self.blocks.clock
        if clock >= self._next:
            self._estimate()
            self._next = clock + min(ESTIMATE_EVERY, max(256, clock // 4))
        return self.table[self.blocks["mark"][blocks], ages(clock - self.blocks["last_use"][blocks])]

    def _estimate(self) -> None:
        b = self.blocks
        known = np.concatenate([records[records["uses"] > 0] for records in (b.records, b.gone)])
        at = known["mark"] * BINS + ages(b.clock - known["last_use"])
        still = np.bincount(at, minlength=CLASSES * BINS).reshape(CLASSES, BINS) + self.censored
        exposed = (self.used + still)[:, ::-1].cumsum(1)[:, ::-1] - still / 2
        common = self.used.sum(0) / np.maximum(exposed.sum(0), 1)
        seen = np.flatnonzero(exposed[:, 0])
        hazard = (self.used[seen] + TRUST * common) / (exposed[seen] + TRUST)
        self.table[:] = density(np.minimum(common, 0.999)[None])
        self.table[seen] = density(np.minimum(hazard, 0.999))
        self.used *= KEEP
        self.censored *= KEEP

    def why(self, record: np.void, clock: int) -> str:
        return f"{super().why(record, clock)}; {record['worth'] * 1e3:.2g} uses expected in 1000 blocks' time"


def ages(ticks: np.ndarray) -> np.ndarray:
    """The bins of these ages."""
    octaves = np.log2(np.maximum(ticks, 2.0) / 4.0)
    return np.clip(np.floor(octaves * PER_OCTAVE).astype(np.int64) + 1, 0, BINS - 1)


def classes(records: np.ndarray) -> np.ndarray:
    """Which blocks are alike."""
    turn = np.clip(records["turn"], -1, 4) + 1
    span = np.digitize(records["span"], (9, 33))
    uses = USES[np.minimum(records["uses"], 8)]
    last = records["depth"] == records["span"] - 1
    return ((turn * 3 + span) * 4 + uses) * 2 + last


def density(hazard: np.ndarray) -> np.ndarray:
    """float [C, A], P(used in a bin | not before) -> the index at the beginning of each bin, uses per tick."""
    stays = np.cumprod(1 - hazard, 1)
    stays = np.concatenate([np.ones((len(stays), 1)), stays], 1)
    held = np.cumsum((stays[:, :-1] + stays[:, 1:]) / 2 * np.diff(EDGES), 1)
    held = np.concatenate([np.zeros((len(held), 1)), held], 1)
    best = np.zeros_like(hazard)
    for end in range(1, BINS + 1):
        ratio = (stays[:, :end] - stays[:, end, None]) / (held[:, end, None] - held[:, :end])
        np.maximum(best[:, :end], ratio, out=best[:, :end])
    return best
