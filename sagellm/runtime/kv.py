"""The KV cache's bookkeeping: who gets which blocks, what is found again, what leaves and where it goes.

Which blocks are kept for later, and which of these leave first, is decided by the pass `kv-eviction-placement`, which
sees this as a `KVView`: without it a block is free as soon as nobody holds it. What is to move is noted in `Moves`
when a step is planned; the step's plan carries it out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from attrs import define, field

from sagellm.batch import Batch, Columns, Moves, Stage
from sagellm.errors import UserError
from sagellm.kv.blocks import KINDS, whose
from sagellm.kv.policies import Policy, policy
from sagellm.kv.prefix import Chain, Details, HostTier, Lookup, PrefixIndex
from sagellm.rows import aliased_blocks
from sagellm.runtime.pool import NO_BLOCKS, BlockPool

RANKED = 16
"""One in so many blocks is ranked at once,"""
AT_LEAST = 16
"""and so many in small pools: ranking costs about the same there for one block and for all."""


@define
class KVCounts:
    """Counted as decisions are made; tokens unless said otherwise."""

    queried: int = 0
    """Known tokens of the sequences that began or went on."""
    hit: int = 0
    """Of these, found on the device."""
    fetched: int = 0
    """Of these, found in host memory."""
    fetched_ahead: int = 0
    """Blocks fetched for sequences that still waited."""
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
        self.policy: Policy | None = None
        """Which of the blocks that nobody holds leave first; None keeps none."""
        self.offload = False
        """Do blocks that leave go to host memory?"""
        self.keep_on_host = True
        """Whether a copy costs less than computing a block again; the core measures it."""
        self._chains: dict[int, Chain] = {}
        self._named = np.zeros(columns.capacity, np.int64)
        """Blocks of a row that the index knows of."""
        self._began = np.zeros(columns.capacity, np.int64)
        """The blocks' clock when the row's sequence began or went on."""
        self._queue = NO_BLOCKS
        """Idle blocks in the order in which they leave, when they were ranked last."""
        self._ranked = np.zeros(blocks, bool)
        """Of these, which nobody has held since, and which did not leave."""
        self._expected: tuple[Chain, np.ndarray, Lookup] | None = None
        """The sequence that waits first."""
        self._promised = NO_BLOCKS
        """Of its blocks, those on the device."""
        self._early = np.zeros(blocks, bool)
        """Blocks that were fetched ahead, until a sequence begins with them."""

    # what the pass decides by

    def retain(self, name: str, *, offload: bool) -> None:
        """Keep blocks that nobody holds until room is needed; this policy says which of them leave first."""
        self.policy, self.offload = policy(name)(self.index.blocks), offload
        self._queue = NO_BLOCKS

    def change_policy(self, name: str) -> None:
        """Another policy from now on; what is in the cache stays."""
        if self.policy is None:
            raise UserError("no pass keeps KV blocks; accepted: a pipeline with kv-eviction-placement")
        self.retain(name, offload=self.offload)

    @property
    def copies_pay(self) -> bool:
        """Is there host memory, and does a copy cost less than computing a block again?"""
        return self.host is not None and self.keep_on_host

    def coming(self, batch: Batch) -> int:
        """Blocks of the sequence that waits first that are in host memory, as many as there is room for in this step
        without one leaving that it needs."""
        if self._expected is None:
            return 0
        missing = self._expected[2].blocks.count(-1)
        if not missing:
            return 0
        kept = int(np.count_nonzero(self._is_idle(self._promised)))
        return max(0, min(missing, self.pool.available - kept - self.growth(batch)))

    def shortage(self, batch: Batch) -> int:
        """Blocks that must leave for this step, and for what comes in it ahead."""
        bound = 2 * batch.decode.size + batch.coming
        if batch.facts:  # guesses, where there are some
            bound += int(self.columns.drafted[batch.decode].sum())
        if batch.prefill.size:
            bound += int(self.columns.new[batch.prefill].sum())
        return 0 if bound <= self.pool.free else max(0, self.growth(batch) + batch.coming - self.pool.free)

    def first_to_leave(self, count: int) -> np.ndarray:
        """At most `count` idle blocks, in the order in which they leave."""
        if self.policy is None or count <= 0:
            return NO_BLOCKS
        blocks = self._queue[self._ranked[self._queue]]
        if len(blocks) < count or self.policy.exact:
            may_leave = self.pool.indexed & (self.pool.references == 0)
            may_leave[self._promised] = False
            blocks = self._rank(np.flatnonzero(may_leave), max(count, AT_LEAST, self.pool.total // RANKED))
            if len(blocks) < count:
                last = self._promised[self._is_idle(self._promised)]
                blocks = np.concatenate([blocks, self._rank(last, count - len(blocks))])
            self._ranked[:] = False
            self._ranked[blocks] = True
        self._queue = blocks
        return blocks[:count]

    def _rank(self, idle: np.ndarray, count: int) -> np.ndarray:
        assert self.policy is not None
        return self.index.blocks.first_to_leave(idle, self.policy.worth(idle), count)

    def _is_idle(self, blocks: np.ndarray) -> np.ndarray:
        return self.pool.indexed[blocks] & (self.pool.references[blocks] == 0)

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

    def expect(
        self, chain: Chain | None, tokens: np.ndarray = NO_BLOCKS, lookup: Lookup | None = None
    ) -> None:
        """The sequence that waits first, and what was found of it; None: none waits. What it will find leaves last."""
        moves, self._expected, self._promised = self.moves, None, NO_BLOCKS
        if moves.fetch_ahead:  # of a step that failed: their blocks may be read now
            moves.fetch += moves.fetch_ahead
            moves.fetch_ahead.clear()
        if chain is None or lookup is None or not lookup.blocks or self.policy is None:
            return
        self._expected = chain, tokens, lookup
        found = np.array(lookup.blocks, np.int64)
        self._promised = found[found >= 0]
        self._ranked[self._promised] = False

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
        self._ranked[blocks[here]] = False
        early = int(np.count_nonzero(self._early[blocks[here]]))
        self._early[blocks[here]] = False
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
        self._began[row] = self.index.blocks.clock
        self.counts.queried += known
        self.counts.hit += min((count - missing - early) * c.block_size, int(c.context[row]))
        self.counts.fetched += (missing + early) * c.block_size

    def fork(self, row: int, parent: int, chain: Chain) -> None:
        """Give a row the prompt of a running one: blocks are shared until one of the two writes into them."""
        c = self.columns
        count = -(-int(c.prompt[row]) // c.block_size)
        self.pool.hold(c.blocks[parent, :count])
        c.blocks[row, :count] = c.blocks[parent, :count]
        c.owned[row] = count
        c.context[row] = c.prompt[row] - 1
        self._chains[row], self._named[row] = chain, int(c.prompt[row]) // c.block_size
        self._began[row] = self.index.blocks.clock
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
        """The row gives its blocks back; what is full stays to be found until room is needed, if blocks are kept."""
        self.publish(row)
        c = self.columns
        blocks = c.blocks[row, : c.owned[row]]
        self._note_use(row, blocks[self.pool.indexed[blocks]])
        idle = self.pool.release(blocks)
        if self.policy is None:
            self._forget(idle, "not kept", "not kept, as no sequence held it")
        c.owned[row] = c.context[row] = 0
        c.blocks[row] = 0
        self._chains.pop(row, None)
        self._named[row] = 0

    def _note_use(self, row: int, blocks: np.ndarray) -> None:
        """The policy learns from a sequence's end."""
        if self.policy is None or not len(blocks):
            return
        records = self.index.blocks
        known = blocks[records["uses"][blocks] > 0]
        self.policy.before_use(known, np.maximum(self._began[row] - records["last_use"][known], 0))
        c = self.columns
        kind = "vector" if c.pooling[row] else "grammar" if c.stages[row] & Stage.GRAMMAR else "text"
        records.use(blocks, int(c.priority[row]), whose(int(c.tenant[row]), KINDS.index(kind)))
        self.policy.after_use(blocks)

    # a step

    def growth(self, batch: Batch) -> int:
        """Blocks that the step takes: for new tokens, and for copies of blocks that it must not write into."""
        c, total = self.columns, 0
        for rows in (batch.decode, batch.prefill):
            if not rows.size:
                continue
            context = c.context[rows]
            lengths = context + c.new[rows]
            if rows is batch.decode:
                lengths += c.drafted[rows]
            wanted = -(-lengths // c.block_size) - c.owned[rows]
            if rows is batch.prefill and np.count_nonzero(c.shared[rows]):
                low, high = aliased_blocks(c, rows)
                wanted -= np.maximum(high - np.maximum(low, c.owned[rows]), 0)
            total += int(np.add.reduce(np.maximum(wanted, 0)))
            if len(blocks := self._written(rows, context)):
                total += int(np.count_nonzero(self.pool.references[blocks] > 1))
        return total

    def _written(self, rows: np.ndarray, context: np.ndarray) -> np.ndarray:
        """The block that holds a row's last tokens and gets its next ones; 0 (padding) if it gets a new one. None at
        all where all rows do."""
        c = self.columns
        within = context % c.block_size
        if not np.count_nonzero(within):
            return NO_BLOCKS
        block = c.blocks[rows, np.minimum(context // c.block_size, c.max_blocks - 1)]
        return np.where(within > 0, block, 0)

    def place(self, batch: Batch) -> None:
        """Let the blocks leave that the passes chose; copy those that the step writes into while others hold them."""
        self.clock += 1
        moves = self.moves
        if moves.ahead:  # of a step that failed: its blocks may be overwritten now
            moves.offload += moves.ahead
            moves.ahead.clear()
        if batch.leaving.size:
            self._leave(batch.leaving, offload=batch.offload)
        if short := self.shortage(batch):
            self._make_room(self.pool.free + short)
        if batch.coming:
            self._fetch_ahead(min(batch.coming, self.pool.free - self.growth(batch)))
        if batch.ahead.size:
            moves.ahead += self._slots_for(batch.ahead, ())
        c, pool = self.columns, self.pool
        for rows in (batch.decode, batch.prefill):
            if not rows.size:
                continue
            if not len(blocks := self._written(rows, c.context[rows])):
                continue
            for row in rows[(pool.references[blocks] > 1) | pool.indexed[blocks]].tolist():
                self._own(row, int(c.context[row]) // c.block_size)
        batch.moves = self.moves

    def _fetch_ahead(self, count: int) -> None:
        """Fetch so many blocks of the sequence that waits first; they are idle until it begins."""
        assert self._expected is not None
        chain, tokens, _ = self._expected
        found = self.lookup(chain, tokens, length=len(tokens))
        missing = [at for at, block in enumerate(found.blocks) if block < 0][:count]
        blocks = self.pool.take(len(missing))
        for at, block in zip(missing, blocks.tolist()):
            self.moves.fetch_ahead.append((found.slots[at], block))
            self._name(block, chain, at, tokens)
        self.pool.release(blocks)
        self._early[blocks] = True
        self._promised = np.concatenate([self._promised, blocks])
        self.counts.fetched_ahead += len(blocks)

    def _own(self, row: int, at: int) -> None:
        """Make a block of the row its own before it is written: by a copy, or by taking it out of the index."""
        c, pool = self.columns, self.pool
        block = c.blocks[row, at : at + 1].copy()
        if pool.references[block] > 1:
            own = pool.take(1)
            self.moves.copy.append((int(block[0]), int(own[0])))
            c.blocks[row, at] = own[0]
            pool.release(block)
            self.counts.copied += 1
        elif pool.indexed[block]:
            self._unname(block, "rewritten", "its holder wrote on")
            pool.indexed[block] = False
        self._named[row] = min(self._named[row], at)

    def _make_room(self, count: int, wanted: Iterable[int] = ()) -> None:
        """Let blocks leave until this many are free; the host slots `wanted` keep what they hold."""
        short = count - self.pool.free
        if short <= 0:
            return
        blocks = self.first_to_leave(short)
        if len(blocks) < short:
            raise MemoryError(f"{short} idle KV blocks wanted, {len(blocks)} are there")
        self._leave(blocks, offload=self.offload, wanted=wanted)

    def _leave(self, blocks: np.ndarray, *, offload: bool, wanted: Iterable[int] = ()) -> None:
        """Idle blocks become free, with a copy in host memory where that pays."""
        assert self.policy is not None
        moves = self.moves
        if offload and self.copies_pay:
            moves.offload += self._slots_for(blocks, wanted)
        if moves.fetch:  # what was to be fetched for a sequence that does not go on
            left = set(blocks.tolist())
            moves.fetch = [pair for pair in moves.fetch if pair[1] not in left]
        self.policy.evicted(blocks)
        details = partial(self.policy.why, clock=self.index.blocks.clock)
        self._forget(blocks, self.policy.name, f"evicted by {self.policy.name} in step {self.clock}", details)
        moves.evict += blocks.tolist()

    def _slots_for(self, blocks: np.ndarray, wanted: Iterable[int]) -> list[tuple[int, int]]:
        """(block, slot) for those of these blocks that get a place in host memory and have none."""
        assert self.host is not None
        moves, pairs = self.moves, []
        coming = self._expected[2].slots if self._expected is not None else ()
        fetched = (slot for slot, _ in (*moves.fetch, *moves.fetch_ahead))
        pinned = {*wanted, *coming, *fetched, *(slot for _, slot in moves.offload)}
        for block in blocks.tolist():
            digest = self.index.digest[block]
            assert digest is not None
            slot = None if self.host.find(digest) is not None else self.host.put(digest, pinned)
            if slot is not None:
                pairs.append((block, slot))
                pinned.add(slot)
        self.counts.offloaded += len(pairs)
        return pairs

    def _forget(self, blocks: np.ndarray, reason: str, why: str, details: Details | None = None) -> None:
        """Idle blocks become free."""
        self._unname(blocks, reason, why, details)
        self.pool.drop(blocks)

    def _unname(self, blocks: np.ndarray, reason: str, why: str, details: Details | None = None) -> None:
        self._ranked[blocks] = self._early[blocks] = False
        lost = self.index.forget(blocks, why, details)
        self.counts.evicted[reason] += len(blocks)
        if self.policy is not None and len(lost):
            self.policy.lost(lost)

    def adopt(self, tokens: np.ndarray, salt: str, fill: Callable[[np.ndarray, np.ndarray], None]) -> int:
        """Keep blocks that were computed elsewhere, as many as there is room for; returns how many are new.

        `fill(at, blocks)` writes the tokens' blocks number `at` into these blocks, after carrying out `moves`.
        """
        chain = self.chain(salt)
        found = len(self.lookup(chain, tokens, length=len(tokens)).blocks)
        count = min(len(tokens) // self.columns.block_size - found, self.pool.available)
        if not self.caching or self.policy is None or count <= 0:
            return 0
        self._make_room(count)
        blocks = self.pool.take(count)
        fill(np.arange(found, found + count), blocks)
        for at, block in enumerate(blocks.tolist(), found):
            self._name(block, chain, at, tokens)
        self.pool.release(blocks)
        return count

    def reset(self) -> int:
        """Forget all idle blocks, as after a change of weights; returns how many there were."""
        idle = np.flatnonzero(self.pool.indexed & (self.pool.references == 0))
        self._forget(idle, "reset", "cache reset")
        if self.host is not None:
            self.host = HostTier(self.host.slots)
        return len(idle)
