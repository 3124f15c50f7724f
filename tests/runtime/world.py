"""A device without a model, under the real scheduler and KV bookkeeping.

Its cache holds, for each token, a number that stands for all tokens up to it and for the tenant, so that whatever a
sequence finds in its blocks can be checked. The next token is a function of the same number, so each output is known.
"""

from __future__ import annotations

from collections.abc import Callable
from zlib import crc32

import numpy as np

from sagellm.batch import Batch, Columns, Phase, Request, SamplingParams
from sagellm.passes.driver import Pipeline, StepView
from sagellm.passes.kv_eviction_placement import KVEvictionPlacement
from sagellm.passes.prefix_dedup import PrefixDedup
from sagellm.rows import build_rows
from sagellm.runtime.kv import KVManager
from sagellm.runtime.scheduler import Scheduler

BLOCK, LONGEST = 4, 24
VOCABULARY = 5
END = 4
"""A token at which sequences end."""
NEVER = -2
"""In its place: sequences end at their limit alone."""


def number(salt: str, tokens) -> int:
    return crc32(np.array(tokens, np.int32).tobytes(), crc32(salt.encode()))


def next_token(salt: str, tokens, sample: int) -> int:
    return number(f"{salt} {sample}", tokens) % VOCABULARY


def expected(request: Request, sample: int, end: int = END) -> list[int]:
    """What the request would give alone."""
    tokens = list(request.prompt)
    limit = min(len(tokens) + request.sampling.max_tokens, LONGEST)
    while len(tokens) < limit:
        tokens.append(next_token(request.salt, tokens, sample))
        if tokens[-1] == end:
            break
    return tokens[len(request.prompt) :]


class Broken(Exception):
    """What a kernel raises."""


class World:
    def __init__(
        self,
        capacity: int = 4,
        blocks: int = 24,
        budget: int = 100,
        *,
        order: str = "fcfs",
        host_slots: int = 0,
        caching: bool = True,
        dedup: bool = True,
        policy: str | None = "lru",
        max_queue: int = 1000,
        end: int = END,
    ):
        self.columns = Columns(capacity, LONGEST, BLOCK)
        self.kv = KVManager(self.columns, blocks + 1, caching=caching, host_slots=host_slots)
        self.time = 0.0
        self.scheduler = Scheduler(
            self.columns,
            self.kv,
            budget,
            order=order,
            max_queue=max_queue,
            end_tokens=(end,),
            clock=lambda: self.time,
        )
        self.end_token = end
        self.view = StepView(kv=self.kv)
        kept = [KVEvictionPlacement(policy)] if policy else []
        self.pipeline = Pipeline([*([PrefixDedup()] if dedup else []), *kept])
        self.pipeline.prepare(self.view)
        self.cache = np.zeros((blocks + 1, BLOCK), np.int64)
        self.host = np.zeros((host_slots, BLOCK), np.int64)
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.finished: list[str] = []
        self.forwarded = self.steps = 0
        self._numbers = 0

    @property
    def pool(self):
        return self.kv.pool

    def submit(self, name: str, prompt: list[int], max_tokens: int = 4, n: int = 1, **fields) -> Request:
        request = Request(name, prompt, SamplingParams(max_tokens=max_tokens, n=n), **fields)
        self.scheduler.submit(request, self._numbers, seed=0)
        self._numbers += 1
        return request

    def schedule(self) -> Batch:
        """As `Planner.schedule`."""
        batch = self.scheduler.propose()
        self.pipeline.decide(batch, self.view)
        while self.scheduler.fit(batch):
            batch.facts.clear()
            self.pipeline.decide(batch, self.view)
        self.scheduler.place(batch)
        return batch

    def step(self, breaks: Callable[[int], bool] = lambda row: False) -> Batch:
        """One step; it raises in the middle for each row for which `breaks`."""
        self.time += 1.0
        self.steps += 1
        batch = self.schedule()
        self.scheduler.counts.began.clear()
        budget = max(self.scheduler.budget, len(batch.decode) + 1)
        assert (
            len(batch.decode) + int((self.columns.new - self.columns.shared)[batch.prefill].sum()) <= budget
        )
        self.run(batch, breaks)
        return batch

    def run(self, batch: Batch, breaks: Callable[[int], bool]) -> None:
        """As `EngineCore._run`."""
        try:
            self.execute(batch, breaks)
        except Broken:
            rows = np.concatenate([batch.decode, batch.prefill])
            if len(rows) == 1:
                self.end(int(rows[0]), failed=True)
                return
            for half in np.array_split(rows, 2):
                part = Batch(self.columns, *(r[np.isin(r, half)] for r in (batch.decode, batch.prefill)))
                self.pipeline.decide(part, self.view)
                self.run(part, breaks)

    def execute(self, batch: Batch, breaks: Callable[[int], bool]) -> None:
        c, moves, shared = self.columns, self.kv.moves, Phase.PREFILL in batch.facts
        moves.evict.clear()
        for block, slot in moves.offload:
            self.host[slot] = self.cache[block]
        for slot, block in moves.fetch:
            self.cache[block] = self.host[slot]
        for block, copy in moves.copy:
            self.cache[copy] = self.cache[block]
        for some in (moves.offload, moves.fetch, moves.copy):
            some.clear()
        self.cache[self.pool.extend(c, batch.decode)] = 0
        self.cache[(self.pool.extend_shared if shared else self.pool.extend)(c, batch.prefill)] = 0
        rows = build_rows(batch, shared=shared)
        every = [*batch.decode.tolist(), *batch.prefill.tolist()]
        owner = {
            int(c.blocks[row, p // BLOCK]) * BLOCK + p % BLOCK: row
            for row in every
            for p in range(c.context[row], c.context[row] + c.new[row])
        }
        written = np.array([self.stands_for(owner[s], p) for s, p in zip(rows.slots, rows.positions)])
        self.cache.reshape(-1)[rows.slots] = written if rows.kv_source is None else written[rows.kv_source]
        if any(breaks(row) for row in every):
            raise Broken
        for block, slot in moves.ahead:
            self.host[slot] = self.cache[block]
        for slot, block in moves.fetch_ahead:
            self.cache[block] = self.host[slot]
        moves.ahead.clear()
        moves.fetch_ahead.clear()
        self.forwarded += rows.forwarded
        outputs = batch.output_rows().tolist()
        for row in every:
            c.context[row] += c.new[row]
        for row in outputs:
            sequence = self.scheduler.sequences[row]
            known = c.tokens[row, : c.length[row]]
            token = next_token(sequence.request.salt, known, sequence.sample)
            c.tokens[row, c.length[row]] = token
            c.length[row] += 1
            self.outputs.setdefault((sequence.request.id, sequence.sample), []).append(token)
        self.scheduler.committed(batch)
        for row in outputs:
            if c.tokens[row, c.length[row] - 1] == self.end_token or c.length[row] >= c.limit[row]:
                self.end(row)

    def end(self, row: int, *, failed: bool = False) -> None:
        sequence = self.scheduler.finish(row)
        if not failed:
            self.finished.append(sequence.request.id)

    def stands_for(self, row: int, position: int) -> int:
        return number(self.scheduler.sequences[row].request.salt, self.columns.tokens[row, : position + 1])

    def run_all(self, limit: int = 10_000) -> list[str]:
        """Steps until nothing is left, at most so many."""
        for _ in range(limit):
            if not self.scheduler.busy:
                return self.finished
            self.step()
        raise AssertionError(
            f"{limit} steps were not enough: {len(self.scheduler.numbers)} requests are left"
        )

    # what must hold

    def check(self) -> None:
        """Between two steps: each block has its holders and nothing else, and holds what its sequence thinks."""
        c, pool, index = self.columns, self.pool, self.kv.index
        rows = self.scheduler._running
        held = np.zeros_like(pool.references)
        held[0] = 1
        for row in rows:
            blocks = c.blocks[row, : c.owned[row]]
            assert len(set(blocks.tolist())) == len(blocks) and 0 not in blocks
            held[blocks] += 1
        assert (held == pool.references).all()
        free = pool._free[: pool.free]
        assert len(set(free.tolist())) == len(free) and not pool.references[free].any()
        assert not pool.indexed[free].any()
        assert pool.idle == np.count_nonzero(pool.indexed & (pool.references == 0))
        assert pool.used == np.count_nonzero(pool.references[1:])
        assert pool.free + pool.idle + pool.used == pool.total
        named = {block: digest for digest, block in index._block.items()}
        assert len(named) == len(index._block) and set(named) == set(np.flatnonzero(pool.indexed).tolist())
        assert all(index.digest[block] == digest for block, digest in named.items())
        records = index.blocks.records
        assert all(records["depth"][b] >= 0 for b in named)
        assert self.kv.policy is not None or not pool.idle, "kept without a pass that keeps"
        assert (records["last_use"] <= index.blocks.clock).all()
        gone = [left.place for left in index._gone.values()]
        assert len(set(gone)) == len(gone) and not set(named.values()) & set(index._gone)
        assert all(index._gone_digests[left.place] == digest for digest, left in index._gone.items())
        leaving = self.kv.first_to_leave(pool.idle)
        assert len(set(leaving.tolist())) == len(leaving) == pool.idle or self.kv.policy is None
        turn = np.full(len(records), -1)
        turn[leaving] = np.arange(len(leaving))
        parent = records["parent"][leaving]
        after = (
            (parent >= 0) & (records["depth"][parent] == records["depth"][leaving] - 1) & (turn[parent] >= 0)
        )
        assert (turn[parent] > turn[leaving])[after].all(), "a block leaves before one that needs it"
        assert sorted([*self.scheduler._free, *rows.tolist()]) == list(range(c.capacity))
        assert sorted(self.scheduler.sequences) == sorted(rows.tolist())
        assert self.scheduler.waiting == sum(1 for _ in self.scheduler.queued())
        moves = self.kv.moves
        pending = {block for _, block in (*moves.fetch, *moves.fetch_ahead, *moves.copy)}
        for row in rows.tolist():
            assert c.context[row] < c.length[row]
            for position in range(c.context[row]):
                block = int(c.blocks[row, position // BLOCK])
                if block not in pending:
                    found = self.cache[block, position % BLOCK]
                    assert found == self.stands_for(row, position), f"row {row}, position {position}"

    def check_whole(self) -> None:
        """Nothing runs or waits: nothing is held."""
        self.check()
        assert not self.scheduler.busy and not self.scheduler._forks and not self.scheduler._alive
        assert self.pool.used == 0 and self.scheduler.waiting == 0
