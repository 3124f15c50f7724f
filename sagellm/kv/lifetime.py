"""Keeps the blocks that promise most uses for the room they take, by what was seen of blocks like them."""

from __future__ import annotations

import math

import numpy as np

from sagellm.kv.blocks import Blocks
from sagellm.kv.policies import Policy

BINS = 40
PER_OCTAVE = 2
EDGES = np.concatenate([[0.0], 4.0 * 2.0 ** (np.arange(BINS) / PER_OCTAVE)])
"""Ages in blocks that entered meanwhile: bin i begins at EDGES[i]."""
USES = np.array([0, 0, 1, 2, 2, 3, 3, 3, 4])
LEVELS = (10, 6, 8, 3)
"""Kinds of blocks by uses and whether the last; of each by turn; of those by new blocks; of those by length."""
CLASSES = math.prod(LEVELS)
TRUST = 5.0
"""So many sequences' worth of what is seen of the wider kind counts as seen of each, at each age,"""
USES_TRUST = 1.0
"""and so many uses for how often it is used at all."""
KEEP = 0.99
"""Of what was seen, weight that stays with each estimate."""
ESTIMATE_EVERY = 4096


class Lifetime(Policy):
    """Predicts when blocks are used again, and keeps those with the most uses to be expected for the time held.

    Blocks fall into classes: how often the block had been used and whether it was its last sequence's last, how often
    that conversation had gone on, how many new blocks it brought, and how long it was. For each class, uses at each
    age and survival to each age are counted as they happen, also of blocks that left (Kaplan and Meier 1958: those of
    which nothing was seen yet count up to their age). A sequence's blocks come back together, so each counts for its
    part of one. A class of which little was seen is like the wider kind it belongs to: `shrunk`.

    The worth of a block at age a is the greatest ratio, over all later ages b, of P(used before b) and E[time held
    until its use or b]: the index of Gittins (1979), which for one age b is the hit density of LHD (Beckmann et al.
    2018). So a block whose use is near stays before a fresh one whose use is far, and one whose time has passed leaves.
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
        mark, span = self.blocks["mark"][blocks], self.blocks["span"][blocks]
        np.add.at(self.used, (mark, ages(waited)), 1 / span)

    def after_use(self, blocks: np.ndarray) -> None:
        records = self.blocks.records[blocks]
        self.blocks["mark"][blocks] = classes(records)

    def lost(self, records: np.ndarray) -> None:
        age = ages(self.blocks.clock - records["last_use"])
        np.add.at(self.censored, (records["mark"], age), 1 / records["span"])

    def worth(self, blocks: np.ndarray) -> np.ndarray:
        clock = self.blocks.clock
        if clock >= self._next:
            self._estimate()
            self._next = clock + min(ESTIMATE_EVERY, max(256, clock // 4))
        return self.table[self.blocks["mark"][blocks], ages(clock - self.blocks["last_use"][blocks])]

    def _estimate(self) -> None:
        still, clock = self.censored.copy(), self.blocks.clock
        for records in (self.blocks.records, self.blocks.gone):
            known = np.flatnonzero(records["uses"])
            at = records["mark"][known] * BINS + ages(clock - records["last_use"][known])
            still += np.bincount(at, 1 / records["span"][known], CLASSES * BINS).reshape(CLASSES, BINS)
        exposed = (self.used + still)[:, ::-1].cumsum(1)[:, ::-1] - still / 2
        hazard, like = shrunk(self.used, exposed)
        self.table = density(hazard)[like]
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
    uses = USES[np.minimum(records["uses"], 8)]
    last = records["depth"] == records["span"] - 1
    turn = np.clip(records["turn"], -1, 4) + 1
    new = np.frexp(np.minimum(records["new"], 64))[1]  # 0, 1, 2 to 3, 4 to 7, ...
    span = np.digitize(records["span"], (9, 33))
    return (((uses * 2 + last) * LEVELS[1] + turn) * LEVELS[2] + new) * LEVELS[3] + span


def shrunk(used: np.ndarray, exposed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float [C, A], uses in each bin and sequences that might have been used in it -> P(used in a bin | not before)
    [curves, A], and the curve of each class [C]; a class of which nothing was seen has that of the wider kind.

    From the widest kind to the narrowest: the curve of the wider kind is scaled to this kind's uses, which needs few
    of them, and then bent to this kind's shape as far as there is evidence.
    """
    hazard = (used.sum(0) / np.maximum(exposed.sum(0), 1))[None]
    curve = np.zeros(1, np.int64)
    for level, width in enumerate(LEVELS):
        kinds = math.prod(LEVELS[: level + 1])
        hits, trials = (counts.reshape(kinds, -1, BINS).sum(1) for counts in (used, exposed))
        hazard = np.repeat(hazard, width, 0)
        scale = (hits.sum(1) + USES_TRUST) / ((trials * hazard).sum(1) + USES_TRUST)
        hazard = np.minimum(hazard * scale[:, None], 0.999)
        hazard = np.minimum((hits + TRUST * hazard) / (trials + TRUST), 0.999)
        new = curve.max() + 1 + np.arange(kinds)
        curve = np.where(trials[:, 0] > 0, new, np.repeat(curve, width))
    _, first, like = np.unique(curve, return_index=True, return_inverse=True)
    return hazard[first], like


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
