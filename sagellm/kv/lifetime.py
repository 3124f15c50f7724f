"""Keeps the blocks that promise most uses for the room they take, by what was seen of blocks like them."""

from __future__ import annotations

import math

import numpy as np

from sagellm.kv.blocks import KINDS, TENANTS, Blocks
from sagellm.kv.policies import Policy

BINS = 40
PER_OCTAVE = 2
EDGES = np.concatenate([[0.0], 4.0 * 2.0 ** (np.arange(BINS) / PER_OCTAVE)])
"""Ages in blocks that entered meanwhile: bin i begins at EDGES[i]."""
FIRST_TICKS = np.ceil(EDGES[1:-1]).astype(np.int64)
"""The first whole age of each bin but the first."""
USES = np.array([0, 0, 1, 2, 2, 3, 3, 3, 4])
NEW = np.frexp(np.arange(65.0))[1].astype(np.int64)
SPAN = np.digitize(np.arange(34), (9, 33))
"""Which of these numbers of uses, of new blocks (0, 1, 2 to 3, 4 to 7, ...) and of blocks at all are alike."""
LEVELS = (10, 6, 8, 3)
"""Kinds of blocks by uses and whether the last; of each by turn; of those by new blocks; of those by length."""
CLASSES = math.prod(LEVELS)
TRUST = 5.0
"""So many sequences' worth of what is seen of the wider kind counts as seen of each, at each age,"""
SPELL = 5
SPELLS = BINS // SPELL
"""Of tenants, so many bins are taken together,"""
WHOSE = TENANTS, len(KINDS), LEVELS[0], SPELLS
"""by kinds of requests and the widest kinds of blocks."""
CELLS = math.prod(WHOSE[:3])
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

    Tenants and kinds of requests differ in when their blocks come back. A block's worth is that of its class, times the
    uses seen of its tenant's requests of its kind for each that their classes foretold: the sum of hazards over the
    time waited, by age, as those that return soon do not return late (the frailty of survival analysis; Andersen et
    al. 1993): `factors`.

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
        self.curve = np.zeros(CLASSES, np.int64)
        """Each class's row in the next three."""
        self.table = np.zeros((1, BINS))
        """The index at the beginning of each bin."""
        self.risk = np.zeros((1, BINS))
        """Uses to be expected until the middle of each bin,"""
        self.half = np.zeros((1, BINS))
        """and from there to its end,"""
        self.before = np.zeros((1, SPELLS + 1))
        """and before each spell."""
        self.used_by, self.foretold_of = np.zeros((2, CELLS, SPELLS))
        """Uses that were seen, and that were to be expected, as in WHOSE;"""
        self.factor: np.ndarray | None = None
        """and what this makes of a worth, where there are several."""
        self._next = 0

    def before_use(self, blocks: np.ndarray, waited: np.ndarray) -> None:
        records = self.blocks.records.take(blocks)
        mark, age, part = records["mark"], ages(waited), 1 / records["span"]
        np.add.at(self.used, (mark, age), part)
        cell, curve = _cells(records["whose"], mark), self.curve[mark]
        np.add.at(self.used_by, (cell, age // SPELL), part)
        risk = self.risk[curve, age] + self.half[curve, age]
        np.add.at(self.foretold_of, cell, self._foretold(mark, risk, part))

    def after_use(self, blocks: np.ndarray) -> None:
        records = self.blocks.records.take(blocks)
        self.blocks["mark"][blocks] = classes(records)

    def lost(self, records: np.ndarray) -> None:
        mark, age, part = self._waits(records)
        np.add.at(self.censored, (mark, age), part)
        foretold = self._foretold(mark, self.risk[self.curve[mark], age], part)
        np.add.at(self.foretold_of, _cells(records["whose"], mark), foretold)

    def _waits(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each: its class, the bin of its age, and its part of a sequence."""
        return records["mark"], ages(self.blocks.clock - records["last_use"]), 1 / records["span"]

    def worth(self, blocks: np.ndarray) -> np.ndarray:
        clock = self.blocks.clock
        if clock >= self._next:
            self._estimate()
            self._next = clock + min(ESTIMATE_EVERY, max(256, clock // 4))
        age = ages(clock - self.blocks["last_use"][blocks])
        mark = self.blocks["mark"][blocks]
        worth = self.table[self.curve[mark], age]
        if self.factor is None:
            return worth
        return worth * self.factor[_cells(self.blocks["whose"][blocks], mark), age // SPELL]

    def _estimate(self) -> None:
        every = self.blocks.records, self.blocks.gone
        records = np.concatenate(
            [some.take(np.flatnonzero(some["uses"])) for some in every]
        )  # a mask takes longer
        mark, age, part = self._waits(records)
        still = self.censored + np.bincount(mark * BINS + age, part, CLASSES * BINS).reshape(CLASSES, BINS)
        exposed = (self.used + still)[:, ::-1].cumsum(1)[:, ::-1] - still / 2
        hazard, self.curve = shrunk(self.used, exposed)
        self.table, self.half = density(hazard), hazard / 2
        self.risk = hazard.cumsum(1) - self.half
        self.before = np.pad(hazard.cumsum(1)[:, SPELL - 1 :: SPELL], ((0, 0), (1, 0)))
        self.factor = None
        if np.count_nonzero(records["whose"] != records["whose"][:1]):
            self.factor = self._factor(records, self._foretold(mark, self.risk[self.curve[mark], age], part))
        for counts in (self.used, self.censored, self.used_by, self.foretold_of):
            counts *= KEEP

    def _factor(self, records: np.ndarray, waiting: np.ndarray) -> np.ndarray:
        """float [CELLS, SPELLS], with what is expected of blocks that wait, [records, SPELLS]."""
        cell = _cells(records["whose"], records["mark"])
        foretold = self.foretold_of + np.stack([np.bincount(cell, spell, CELLS) for spell in waiting.T], 1)
        return factors(self.used_by.reshape(WHOSE), foretold.reshape(WHOSE)).reshape(CELLS, SPELLS)

    def _foretold(self, mark: np.ndarray, risk: np.ndarray, part: np.ndarray) -> np.ndarray:
        """float [blocks, SPELLS]: uses to be expected in each spell of blocks that waited through this much risk."""
        before = self.before[self.curve[mark]]
        return np.clip(risk[:, None] - before[:, :-1], 0, np.diff(before)) * part[:, None]

    def why(self, record: np.void, clock: int) -> str:
        return f"{super().why(record, clock)}; {record['worth'] * 1e3:.2g} uses expected in 1000 blocks' time"


def _cells(whose: np.ndarray, mark: np.ndarray) -> np.ndarray:
    """Of each: the cell of its request's tenant and kind, and of its widest kind."""
    return whose * LEVELS[0] + mark // (CLASSES // LEVELS[0])


def ages(ticks: np.ndarray) -> np.ndarray:
    """The bins of these ages."""
    return FIRST_TICKS.searchsorted(ticks, "right")


def classes(records: np.ndarray) -> np.ndarray:
    """Which blocks are alike."""
    uses = USES[np.minimum(records["uses"], 8)]
    last = records["depth"] == records["span"] - 1
    turn = np.minimum(records["turn"], 4) + 1
    new = NEW[np.minimum(records["new"], 64)]
    span = SPAN[np.minimum(records["span"], 33)]
    return (((uses * 2 + last) * LEVELS[1] + turn) * LEVELS[2] + new) * LEVELS[3] + span


def shrunk(used: np.ndarray, exposed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float [C, A], uses in each bin and sequences that might have been used in it -> P(used in a bin | not before)
    [curves, A], and the curve of each class [C]; a class of which nothing was seen has that of the wider kind.

    From the widest kind to the narrowest: the curve of the wider kind is scaled to this kind's uses, which needs few
    of them, and then bent to this kind's shape as far as there is evidence.
    """
    seen = np.flatnonzero(exposed[:, 0] > 0)
    used, exposed = used[seen], exposed[seen]
    curves = [(used.sum(0) / np.maximum(exposed.sum(0), 1))[None]]
    curve, count = np.zeros(1, np.int64), 1
    for level, width in enumerate(LEVELS):
        kinds, first = np.unique(seen // math.prod(LEVELS[level + 1 :]), return_index=True)
        hazard = np.concatenate(curves)[curve[kinds // width]]
        curve = np.repeat(curve, width)
        if not len(kinds):
            continue
        hits, trials = np.add.reduceat(used, first), np.add.reduceat(exposed, first)
        scale = (hits.sum(1) + USES_TRUST) / ((trials * hazard).sum(1) + USES_TRUST)
        hazard = np.minimum(hazard * scale[:, None], 0.999)
        curves.append(np.minimum((hits + TRUST * hazard) / (trials + TRUST), 0.999))
        curve[kinds] = count + np.arange(len(kinds))
        count += len(kinds)
    _, first, like = np.unique(curve, return_index=True, return_inverse=True)
    return np.concatenate(curves)[curve[first]], like


def factors(used: np.ndarray, foretold: np.ndarray) -> np.ndarray:
    """float [TENANTS, KINDS, kinds of blocks, SPELLS], uses seen and foretold -> how many are seen for each that is
    foretold, beside what all requests have of it. Where few are foretold, as many as of all blocks of the tenant's
    requests of that kind, and where those are few, as many as of all requests of the kind; so where all requests are
    of one tenant and kind, 1.
    """
    foretold = foretold * (used.sum((0, 1)) / np.maximum(foretold.sum((0, 1)), 1e-9))
    kinds = (used.sum((0, 2)) + TRUST) / (foretold.sum((0, 2)) + TRUST)
    whose = (used.sum(2) + TRUST * kinds) / (foretold.sum(2) + TRUST)
    return (used + TRUST * whose[:, :, None]) / (foretold + TRUST)


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
