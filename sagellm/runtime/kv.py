"""The KV cache's bookkeeping: who gets which blocks, what is found again, what leaves and where it goes.

Decisions are made when a step is planned, and noted in `Moves`; the step's plan carries them out before it computes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable

import numpy as np
from attrs import define, field

from sagellm.batch import Batch, Columns, Moves
from sagellm.rows import aliased_blocks
from sagellm.runtime.pool import BlockPool
from sagellm.runtime.prefix import Chain, HostTier, Lookup, PrefixIndex

QUEUE = 512
"""Blocks whose turn to leave is worked out at once."""


@define
class KVCounts:
    """Counted as decisions are made; tokens unless said otherwise."""

    queried: int = 0
    """Known tokens of the sequences that began or went on."""
    hit: int = 0
    """Of these, found on the device."""
    fetched: int = 0
    """Of these, found in host memory."""
    evicted: Counter = field(factory=Counter)
    """Why blocks left the index -> how many."""
    offloaded: int = 0
    """Of those that made room, blocks kept in host memory."""
    copied: int = 0
    """Blocks copied before a write, as others hold them too."""


class KVManager:
    """Owns pool, index and host tier. A row's blocks change only here and in `kv.allocate`."""

    def __init__(
        self,
        columns: Columns,
        blocks: int,
        *,
        identity: str = "",
        caching: bool = True,
        host_slots: int = 0,
    ):
        self.columns, self.caching = columns, caching
        self.pool = BlockPool(blocks)
        self.index = PrefixIndex(blocks, columns.block_size, identity)
        self.host = HostTier(host_slots) if host_slots else None
        self.moves = Moves()
        """What the next step has to carry out; stays until a step did."""
        self.counts = KVCounts()
        self.clock = 0
        """Steps planned: what eviction goes by."""
        self.keep_on_host = True
        """Whether a copy costs less than computing a block again; the core measures it."""
        self._chains: dict[int, Chain] = {}
        self._named = np.zeros(columns.capacity, np.int64)
        """Blocks of a row that the index knows of."""
        self._leaving: deque[tuple[int, int]] = deque()

    # a sequence begins, goes on, ends

    def chain(self, salt: str) -> Chain:
        return self.index.chain(salt)

    def lookup(self, chain: Chain, tokens: np.ndarray, *, length: int) -> Lookup:
        """What is there of these known tokens, int32 [length]."""
        if not self.caching or length > self.columns.alike_up_to:
            return Lookup(
                [], [], 0, "prefix caching is off" if not self.caching else "keys depend on the length"
            )
        return self.index.lookup(chain, tokens, self.host)

    def held(self, lookup: Lookup) -> int:
        """Of the blocks found, those that cost no room, as other sequences hold them."""
        found = np.array([b for b in lookup.blocks if b >= 0], np.int64)
        return int(np.count_nonzero(self.pool.references[found]))

    def attach(self, row: int, chain: Chain, lookup: Lookup) -> None:
        """Give a row what was found; at least its last known token stays to be computed."""
        c = self.columns
        count, known = len(lookup.blocks), int(c.length[row])
        blocks = np.array(lookup.blocks, np.int32)
        here = blocks >= 0
        self.pool.hold(blocks[here])
        missing = count - int(here.sum())
        if missing:
            self._make_room(missing, wanted=lookup.slots)
            blocks[~here] = self.pool.take(missing)
            for at in np.flatnonzero(~here).tolist():
                self.moves.fetch.append((lookup.slots[at], int(blocks[at])))
                self._name(int(blocks[at]), chain, at, c.tokens[row])
        c.blocks[row, :count] = blocks
        c.owned[row] = count
        c.context[row] = min(count * c.block_size, known - 1)
        self._chains[row], self._named[row] = chain, count
        self.counts.queried += known
        self.counts.hit += min((count - missing) * c.block_size, int(c.context[row]))
        self.counts.fetched += missing * c.block_size

    def fork(self, row: int, parent: int, chain: Chain) -> None:
        """Give a row the prompt of a running one: blocks are shared until one of the two writes into them."""
        c = self.columns
        count = -(-int(c.prompt[row]) // c.block_size)
        self.pool.hold(c.blocks[parent, :count])
        c.blocks[row, :count] = c.blocks[parent, :count]
        c.owned[row] = count
        c.context[row] = c.prompt[row] - 1
        self._chains[row], self._named[row] = chain, int(c.prompt[row]) // c.block_size
        self.counts.queried += int(c.length[row])
        self.counts.hit += int(c.context[row])

    def publish(self, row: int) -> None:
        """Let others find the row's full blocks."""
        c = self.columns
        full = int(c.context[row]) // c.block_size
        if not self.caching or full <= self._named[row] or c.length[row] > c.alike_up_to:
            return
        chain = self._chains[row]
        chain.extend(c.tokens[row], full, c.block_size)
        for at in range(int(self._named[row]), full):
            self._name(int(c.blocks[row, at]), chain, at, c.tokens[row])
        self._named[row] = full

    def _name(self, block: int, chain: Chain, at: int, tokens: np.ndarray) -> None:
        if self.index.insert(block, chain, at, tokens):
            self.pool.indexed[block] = True

    def release(self, row: int) -> None:
        """The row gives its blocks back; what is full stays to be found until room is needed."""
        self.publish(row)
        c = self.columns
        idle = self.pool.release(c.blocks[row, : c.owned[row]])
        self.index.last_use[idle] = self.clock
        c.owned[row] = c.context[row] = 0
        c.blocks[row] = 0
        self._chains.pop(row, None)
        self._named[row] = 0

    # a step

    def growth(self, batch: Batch) -> int:
        """Blocks that the step takes: for new tokens, and for copies of blocks that it must not write into."""
        c, total = self.columns, 0
        for rows in (batch.decode, batch.prefill):
            wanted = -(-(c.context[rows] + c.new[rows] + c.drafted[rows]) // c.block_size) - c.owned[rows]
            if rows is batch.prefill and c.shared[rows].any():
                low, high = aliased_blocks(c, rows)
                wanted -= np.maximum(high - np.maximum(low, c.owned[rows]), 0)
            total += int(np.maximum(wanted, 0).sum()) + int(
                np.count_nonzero(self.pool.references[self._written(rows)] > 1)
            )
        return total

    def _written(self, rows: np.ndarray) -> np.ndarray:
        """The block that holds a row's last tokens and gets its next ones; 0 (padding) if it gets a new one."""
        c, context = self.columns, self.columns.context[rows]
        block = c.blocks[rows, np.minimum(context // c.block_size, c.max_blocks - 1)]
        return np.where(context % c.block_size > 0, block, 0)

    def place(self, batch: Batch) -> None:
        """Make the room that the step needs, and copies of blocks that it writes into while others hold them."""
        self.clock += 1
        self._make_room(self.growth(batch))
        c, pool = self.columns, self.pool
        for rows in (batch.decode, batch.prefill):
            blocks = self._written(rows)
            for row in rows[(pool.references[blocks] > 1) | pool.indexed[blocks]].tolist():
                self._own(row, int(c.context[row]) // c.block_size)
        batch.moves = self.moves

    def _own(self, row: int, at: int) -> None:
        """Make a block of the row its own before it is written: by a copy, or by taking it out of the index."""
        c, pool = self.columns, self.pool
        block = c.blocks[row, at : at + 1].copy()
        if pool.references[block] > 1:
            own = pool.take(1)
            self.moves.copy.append((int(block[0]), int(own[0])))
            c.blocks[row, at] = own[0]
            self.index.last_use[pool.release(block)] = self.clock
            self.counts.copied += 1
        elif pool.indexed[block]:
            self.index.forget(block, "its holder wrote on")
            self.counts.evicted["rewritten"] += 1
            pool.indexed[block] = False
        self._named[row] = min(self._named[row], at)

    def _make_room(self, count: int, wanted: Iterable[int] = ()) -> None:
        """Drop idle blocks until this many are free; the host slots `wanted` keep what they hold."""
        count -= self.pool.free
        if count <= 0:
            return
        victims = self._victims(count)
        if self.host is not None and self.keep_on_host:
            moves = self.moves
            pinned = {*wanted, *(slot for slot, _ in moves.fetch), *(slot for _, slot in moves.offload)}
            for block in victims.tolist():
                digest = self.index.digest[block]
                assert digest is not None
                slot = None if self.host.find(digest) is not None else self.host.put(digest, pinned)
                if slot is not None:
                    self.moves.offload.append((block, slot))
                    self.counts.offloaded += 1
        self.index.forget(victims, f"evicted by lru in step {self.clock}")
        self.pool.drop(victims)
        self.moves.evict += victims.tolist()
        self.counts.evicted["lru"] += len(victims)

    def _victims(self, count: int) -> np.ndarray:
        """Idle blocks, least recently used first and children before their parents."""
        victims: list[int] = []
        pool, last_use = self.pool, self.index.last_use
        while len(victims) < count:
            if not self._leaving:
                idle = pool.indexed & (pool.references == 0)
                idle[victims] = False
                blocks = np.flatnonzero(idle)
                order = blocks[np.lexsort((-self.index.depth[blocks], last_use[blocks]))]
                chosen = order[: max(QUEUE, count - len(victims))]
                if not len(chosen):
                    raise MemoryError(f"{count} idle KV blocks wanted, {len(victims)} are there")
                self._leaving.extend(zip(chosen.tolist(), last_use[chosen].tolist()))
            block, used = self._leaving.popleft()
            if pool.indexed[block] and pool.references[block] == 0 and last_use[block] == used:
                victims.append(block)
        return np.array(victims, np.int32)

    def adopt(self, tokens: np.ndarray, salt: str, fill: Callable[[np.ndarray, np.ndarray], None]) -> int:
        """Keep blocks that were computed elsewhere, as many as there is room for; returns how many are new.

        `fill(at, blocks)` writes the tokens' blocks number `at` into these blocks, after carrying out `moves`.
        """
        chain = self.chain(salt)
        found = len(self.lookup(chain, tokens, length=len(tokens)).blocks)
        count = min(len(tokens) // self.columns.block_size - found, self.pool.available)
        if not self.caching or count <= 0:
            return 0
        self._make_room(count)
        blocks = self.pool.take(count)
        fill(np.arange(found, found + count), blocks)
        for at, block in enumerate(blocks.tolist(), found):
            self._name(block, chain, at, tokens)
        self.index.last_use[self.pool.release(blocks)] = self.clock
        return count

    def reset(self) -> int:
        """Forget all idle blocks, as after a change of weights; returns how many there were."""
        idle = np.flatnonzero(self.pool.indexed & (self.pool.references == 0))
        self.index.forget(idle, "cache reset")
        self.counts.evicted["reset"] += len(idle)
        self.pool.drop(idle)
        if self.host is not None:
            self.host = HostTier(self.host.slots)
        return len(idle)
