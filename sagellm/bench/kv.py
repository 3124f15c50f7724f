"""Which share of a trace's blocks each policy finds in the cache, beside the optimum.

A trace goes through the KV cache's own bookkeeping: lookup, room, names, release, one request after another. A block
of the trace is a block of the pool. A hit is a block that is found behind all those before it; the ratio is of all
blocks asked for. All blocks of a request stay while it runs, so Belady's rule (1966; the block whose next use is
farthest leaves first) is the optimum: a block is used no earlier than its parent, so what it keeps can be found.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np
from attrs import frozen

from sagellm.batch import Batch, Columns, Request, SamplingParams
from sagellm.bench.workload import TraceRow
from sagellm.errors import UserError
from sagellm.grammar import Grammar
from sagellm.kv.blocks import Blocks
from sagellm.kv.policies import POLICIES, Policy
from sagellm.kv.prefix import Fate
from sagellm.passes.driver import StepView
from sagellm.passes.kv_eviction_placement import KVEvictionPlacement
from sagellm.runtime.kv import KVManager

BELADY = "belady"
PLAIN, FORMED = SamplingParams(), SamplingParams(grammar=Grammar.regex(".*"))


@frozen
class Asked:
    """A prompt, and who asks for what."""

    ids: np.ndarray
    """int32: its tokens."""
    salt: str = ""
    grammar: bool = False


@frozen
class Served:
    """What one request found."""

    number: int
    found: int
    """Blocks from its beginning."""
    asked: int
    fates: list[Fate]
    """Of each block, where that was asked for."""


@frozen
class Replayed:
    """What a policy made of a trace."""

    policy: str
    blocks: int
    hits: int
    asked: int
    evicted: int
    deciding: float
    """Seconds of the processor spent on ranking, and on what a policy estimates for it."""

    @property
    def ratio(self) -> float:
        return self.hits / self.asked


class Belady(Policy):
    """The block whose next use is farthest leaves first; it knows the future."""

    name = BELADY
    exact = True

    def __init__(self, blocks: Blocks, prompts: Sequence[Asked]):
        super().__init__(blocks)
        self._next, following = [], {}
        for number in range(len(prompts) - 1, -1, -1):
            asked = prompts[number]
            ids = [(asked.salt, identity) for identity in asked.ids.tolist()]
            self._next.append([following.get(identity, len(prompts)) for identity in ids])
            following |= dict.fromkeys(ids, number)

    def after_use(self, blocks: np.ndarray) -> None:
        self.blocks["mark"][blocks] = self._next.pop()

    def worth(self, blocks: np.ndarray) -> np.ndarray:
        return -self.blocks["mark"][blocks].astype(float)


class Replay:
    """A KV cache of so many blocks, under the pass with this policy."""

    def __init__(self, policy: str, blocks: int, prompts: Sequence[Asked], block_size: int = 1):
        longest = max(len(asked.ids) for asked in prompts)
        needed = -(-longest // block_size)
        if blocks < needed:
            raise UserError(f"{blocks} blocks; accepted: at least {needed}, those of the longest request")
        self.columns = Columns(1, longest + 1, block_size)
        self.kv = KVManager(self.columns, blocks + 1)
        self.keeps = KVEvictionPlacement("lru" if policy == BELADY else policy)
        self.view = StepView(kv=self.kv)
        self.keeps.prepare(self.view)
        if policy == BELADY:
            self.kv.policy = Belady(self.kv.index.blocks, prompts)
        self.policy, self.prompts, self.deciding = policy, prompts, 0.0

    def serve(self, *, explain: bool = False) -> Iterable[Served]:
        """One request after another, as the scheduler and a step would have it; of each prompt, its full blocks."""
        c, kv, row = self.columns, self.kv, 0
        batch = Batch(c, np.zeros(0, np.int64), np.zeros(1, np.int64))
        for number, asked in enumerate(self.prompts):
            ids, chain, length = asked.ids, kv.chain(asked.salt), len(asked.ids)
            c.fill(row, Request("trace", [0], FORMED if asked.grammar else PLAIN, salt=asked.salt))
            c.tokens[row, :length], c.length[row] = ids, length
            fates = kv.index.fates(chain, ids, None) if explain else []
            lookup = kv.lookup(chain, ids, length=length)
            kv.attach(row, chain, lookup)
            c.new[row] = length - c.context[row]
            began = time.process_time()
            self.keeps.decide(batch, self.view)
            self.deciding += time.process_time() - began
            kv.place(batch)
            kv.moves.evict.clear()
            kv.pool.extend(c, batch.prefill)
            c.context[row] = length
            kv.publish(row)
            kv.release(row)
            yield Served(number, len(lookup.blocks), length // c.block_size, fates)

    def run(self) -> Replayed:
        hits = asked = 0
        for served in self.serve():
            hits, asked = hits + served.found, asked + served.asked
        evicted = self.kv.counts.evicted[self.policy]
        return Replayed(self.policy, self.kv.pool.total, hits, asked, evicted, self.deciding)


def prompts(rows: Sequence[TraceRow]) -> list[Asked]:
    """The block ids of each request, as small numbers, in place of tokens."""
    numbers: dict[int, int] = {}
    return [
        Asked(
            np.array([numbers.setdefault(i, len(numbers)) for i in row.hash_ids], np.int32),
            row.tenant,
            row.grammar,
        )
        for row in rows
    ]


def compare(rows: Sequence[TraceRow], policies: Sequence[str], pools: Sequence[int]) -> Iterable[dict]:
    """A result for each pool and policy. `gain` is the part of the way from lru to the optimum."""
    asked = prompts(rows)
    for blocks in pools:
        lru, best = (Replay(name, blocks, asked).run() for name in ("lru", BELADY))
        for name in policies:
            found = {"lru": lru, BELADY: best}.get(name) or Replay(name, blocks, asked).run()
            way = best.ratio - lru.ratio
            yield {
                "blocks": blocks,
                "policy": name,
                "hit_ratio": round(found.ratio, 4),
                "belady": round(best.ratio, 4),
                "gain": round((found.ratio - lru.ratio) / way, 3) if way > 0 else 0.0,
                "evicted": found.evicted,
                "us_per_block": round(found.deciding / max(1, found.evicted) * 1e6, 1),
            }


EVERY = (*POLICIES, BELADY)
