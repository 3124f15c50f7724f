"""What is known of each cached block: a record of numbers, which outlives the block's stay on the device.

Clocks count blocks that entered the index, so ages mean the same on a fast machine and a slow one.
"""

from __future__ import annotations

import numpy as np

RECORD = np.dtype(
    [
        ("depth", np.int32),
        ("parent", np.int32),
        ("last_use", np.int64),
        ("entered", np.int64),
        ("uses", np.int32),
        ("turn", np.int32),
        ("span", np.int32),
        ("new", np.int32),
        ("priority", np.int32),
        ("whose", np.int32),
        ("mark", np.int32),
        ("worth", np.float32),
        ("again", np.bool_),
    ],
    align=True,
)
"""depth: its number in its sequence, from 0. parent: the block before it, -1 at the beginning. last_use, entered: on
the clock. uses: sequences that ended with it. turn: how often the conversation of its last sequence had gone on; -1
where that sequence shared a beginning and went another way. span: full blocks of that sequence. new: of these, those
not used before. priority: of its request; lower is more urgent. whose: that request's tenant and kind. mark: the
policy's own. worth: when it was last ranked. again: it came back after it had left."""

BRANCHED = -1
TENANTS = 256
"""So many are told apart; of more, some count as one."""
KINDS = ("text", "grammar", "vector")
"""What a request wants: to be continued, to be continued in a form, or its prompt's vector."""


def whose(tenant: int, kind: int) -> int:
    """A number for requests of a tenant, any number, and of one of KINDS."""
    return tenant % TENANTS * len(KINDS) + kind


def times(uses: int) -> str:
    return {0: "not used", 1: "used once"}.get(uses, f"used {uses} times")


class Blocks:
    """A record for each block of the pool, and for the blocks that left last."""

    def __init__(self, count: int, remembered: int):
        self.records = np.zeros(count, RECORD)
        self.gone = np.zeros(remembered, RECORD)
        """A ring: `uses` is 0 where the block came back."""
        self.clock = 0

    def __getitem__(self, name: str) -> np.ndarray:
        """The column of this name, [blocks]."""
        return self.records[name]

    def enter(self, block: int, parent: int, depth: int, gone: int) -> None:
        """A block begins its stay; `gone` is its place among those that left, or -1."""
        self.clock += 1
        if gone >= 0:
            self.records[block] = self.gone[gone]
            self.gone["uses"][gone] = 0
        else:
            self.records[block] = 0
            self.records["last_use"][block] = self.clock
        record = self.records[block]
        record["depth"], record["parent"], record["again"] = depth, parent, gone >= 0
        record["entered"] = self.clock

    def known(self, blocks: np.ndarray) -> int:
        """How many of a sequence's blocks, from its beginning, were used before."""
        new = np.flatnonzero(self.records["uses"][blocks] == 0)
        return int(new[0]) if len(new) else len(blocks)

    def use(self, blocks: np.ndarray, priority: int, whose: int = 0) -> None:
        """A sequence ended that had these blocks, from its beginning on."""
        records, known = self.records, self.known(blocks)
        turn = 0
        if known:
            last = records[blocks[known - 1]]
            if known >= last["span"] - 1 and last["span"] > 1:
                turn = max(0, int(last["turn"])) + 1
            elif known > 1:
                turn = BRANCHED
        records["uses"][blocks] += 1
        records["turn"][blocks] = turn
        records["span"][blocks] = len(blocks)
        records["new"][blocks] = len(blocks) - known
        records["priority"][blocks] = priority
        records["whose"][blocks] = whose
        records["last_use"][blocks] = self.clock

    def first_to_leave(self, idle: np.ndarray, worth: np.ndarray, count: int) -> np.ndarray:
        """`count` of the idle blocks, those of least worth first. A block stays while one behind it stays, as that one
        cannot be found without it: so its worth is at least theirs.
        """
        depth, parent = self.records["depth"], self.records["parent"][idle]
        value = np.full(len(self.records), np.inf)
        value[idle] = worth
        behind = (parent >= 0) & (depth[parent] == depth[idle] - 1)
        above = np.arange(len(value))
        above[idle] = np.where(behind, parent, idle)
        while np.count_nonzero(value[above] < value):  # 1, 2, 4, ... blocks up
            np.maximum.at(value, above, value)
            above = above[above]
        worth = value[idle]
        if count < len(idle):
            chosen = worth <= np.partition(worth, count - 1)[count - 1]
            idle, worth = idle[chosen], worth[chosen]
        order = np.lexsort((-depth[idle], worth))[:count]
        self.records["worth"][idle[order]] = worth[order]
        return idle[order]
