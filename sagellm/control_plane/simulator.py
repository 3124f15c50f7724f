"""A trace over simulated engines: router, fleet and the engines' KV bookkeeping are the real ones, time is not.

Each engine has a KV cache of its own, whose blocks are the trace's, under the pass that keeps blocks. A step takes what
`StepCost` says of the tokens that go through it: one of each sequence that decodes, and of prompts as many as the
budget leaves, in the order in which they came. Attention is left out, and so are the blocks of outputs, as a trace does
not say which of them come back.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from attrs import define, frozen

from sagellm.batch import Batch, Columns, Request
from sagellm.bench.workload import TraceRow
from sagellm.control_plane.routing.ask import Ask
from sagellm.control_plane.routing.decision import Router
from sagellm.control_plane.routing.fleet import Fleet
from sagellm.engine.stats import EngineLoad
from sagellm.errors import UserError
from sagellm.kv.prefix import Chain, Lookup
from sagellm.passes.driver import StepView
from sagellm.passes.kv_eviction_placement import KVEvictionPlacement
from sagellm.runtime.kv import KVManager
from sagellm.target import CostModel, StepCost

ACCELERATOR = CostModel(flops={"bfloat16": 3e14}, bytes_per_second=1.5e12, call=5e-6)
COST = StepCost.of(ACCELERATOR, parameters=7_000_000_000, layers=32, dtype="bfloat16")
"""Of a model of 7 billion parameters on an accelerator of 300 TFLOP/s and 1.5 TB/s, all assumed."""
SEQUENCES, BUDGET = 128, 8192
"""Of an engine: sequences that run at once, and tokens of a step."""
REPORT_SECONDS = 1.0
"""Between two reports of how busy an engine is."""
MODEL = "simulated"


@define(eq=False)
class Served:
    """A request and what became of it; seconds of the simulation, tokens."""

    ask: Ask
    ids: np.ndarray
    """int32 [blocks of the prompt]"""
    output: int
    sent: float
    left: int = 0
    """Prompt tokens still to be computed."""
    cached: int = 0
    first: float = 0.0
    finished: float = 0.0


class Cache:
    """The KV cache of an engine, a block of the trace in each of its blocks; a sequence is a row."""

    def __init__(self, blocks: int, longest: int, sequences: int, policy: str):
        self.columns = Columns(sequences, longest + 2, 1)
        self.kv = KVManager(self.columns, blocks + 1)
        self.keeps, self.view = KVEvictionPlacement(policy), StepView(kv=self.kv)
        self.keeps.prepare(self.view)
        for row in range(sequences):
            self.columns.fill(row, Request("simulated", [0]))
        self.free = list(range(sequences))

    def enter(self, ids: np.ndarray) -> tuple[int, int] | None:
        """A row for this prompt, and how many of its blocks are there; None as long as there is no room."""
        if not self.free:
            return None
        c, kv, length = self.columns, self.kv, len(ids)
        chain: Chain = kv.chain("")
        lookup: Lookup = kv.lookup(chain, ids, length=length)
        # its last block is computed again, and so is one more than those missing where all are there
        if length + 1 - kv.held(lookup) > kv.pool.available:
            return None
        row = self.free.pop()
        c.tokens[row, :length], c.length[row] = ids, length
        kv.attach(row, chain, lookup)
        c.new[row] = length - c.context[row]
        batch = Batch(c, np.zeros(0, np.int64), np.array([row]))
        self.keeps.decide(batch, self.view)
        kv.place(batch)
        kv.moves.evict.clear()
        kv.moves.copy.clear()
        kv.pool.extend(c, batch.prefill)
        return row, len(lookup.blocks)

    def computed(self, row: int) -> None:
        """Its prompt's blocks can be found."""
        self.columns.context[row] = self.columns.length[row]
        self.kv.publish(row)

    def leave(self, row: int) -> None:
        self.kv.release(row)
        self.free.append(row)


class SimulatedEngine:
    """Continuous batching: requests join and leave between steps."""

    def __init__(self, cache: Cache, cost: StepCost, block: int):
        self.cache, self.cost, self.block = cache, cost, block
        self.now = self.busy = 0.0
        self.waiting: deque[Served] = deque()
        self.prefilling: deque[tuple[Served, int]] = deque()
        self.decoding: list[tuple[int, int, Served, int]] = []
        """A heap: in which step it ends, a number, the request, its row."""
        self.said: deque[tuple[float, bool, Served]] = deque()
        """When, whether it is its end (or its first token), and of which request."""
        self._steps = self._numbers = 0

    @property
    def load(self) -> EngineLoad:
        pool = self.cache.kv.pool
        running = len(self.prefilling) + len(self.decoding)
        return EngineLoad(running=running, waiting=len(self.waiting), kv_use=pool.used / pool.total)

    def submit(self, request: Served) -> None:
        if not (self.waiting or self.prefilling or self.decoding):
            self.now = max(self.now, request.sent)
        self.waiting.append(request)

    def run(self, until: float) -> None:
        """Steps that begin before this time."""
        while self.now < until and (self.waiting or self.prefilling or self.decoding):
            self._admit()
            self._step(until)

    def _admit(self) -> None:
        while self.waiting and (place := self.cache.enter(self.waiting[0].ids)) is not None:
            request, (row, found) = self.waiting.popleft(), place
            request.cached = min(found * self.block, request.ask.prompt_tokens - 1)
            request.left = request.ask.prompt_tokens - request.cached
            self.prefilling.append((request, row))

    def _step(self, until: float) -> None:
        room = max(0, BUDGET - len(self.decoding))
        done, prompt = [], 0
        while self.prefilling and prompt < room:
            request, row = self.prefilling[0]
            part = min(request.left, room - prompt)
            request.left, prompt = request.left - part, prompt + part
            if not request.left:
                done.append(self.prefilling.popleft())
        seconds, steps = float(self.cost.seconds(len(self.decoding) + prompt)), 1
        if not prompt:  # nothing changes until one ends or comes
            steps = min(self.decoding[0][0] - self._steps, max(1, int(min(until - self.now, 1e9) // seconds)))
        self._steps += steps
        self.now += steps * seconds
        self.busy += steps * seconds
        while self.decoding and self.decoding[0][0] <= self._steps:
            _, _, request, row = heapq.heappop(self.decoding)
            self._end(request, row)
        for request, row in done:
            self.cache.computed(row)
            request.first = self.now
            self.said.append((self.now, False, request))
            if request.output == 1:
                self._end(request, row)
            else:
                self._numbers += 1
                ends = self._steps + request.output - 1
                heapq.heappush(self.decoding, (ends, self._numbers, request, row))

    def _end(self, request: Served, row: int) -> None:
        request.finished = self.now
        self.cache.leave(row)
        self.said.append((self.now, True, request))


@frozen
class Simulated:
    """What a strategy made of a trace; seconds and tokens."""

    strategy: str
    served: list[Served]
    busy: list[float]
    """Of each engine, seconds in which it computed."""

    @property
    def cached(self) -> float:
        """Part of all prompt tokens that were found in a cache."""
        return sum(r.cached for r in self.served) / sum(r.ask.prompt_tokens for r in self.served)

    @property
    def imbalance(self) -> float:
        """The busiest engine's time over the mean."""
        return max(self.busy) / (sum(self.busy) / len(self.busy))

    def summary(self) -> dict[str, object]:
        first = np.array([r.first - r.sent for r in self.served])
        each = np.array([(r.finished - r.first) / (r.output - 1) for r in self.served if r.output > 1])
        return {
            "strategy": self.strategy,
            "cached": round(self.cached, 4),
            "ttft_p50_s": round(float(np.percentile(first, 50)), 3),
            "ttft_p95_s": round(float(np.percentile(first, 95)), 3),
            "tpot_p50_ms": round(float(np.percentile(each, 50)) * 1e3, 2) if len(each) else 0.0,
            "imbalance": round(self.imbalance, 3),
            "busy_s": round(sum(self.busy), 1),
        }


def simulate(
    rows: Sequence[TraceRow],
    strategy: str,
    engines: int,
    blocks: int,
    *,
    pace: float = 1.0,
    seed: int = 0,
    policy: str = "lifetime",
    cost: StepCost = COST,
) -> Simulated:
    """The trace's requests, `pace` times as fast as they came, over so many engines with so many KV blocks each."""
    longest, block = max(len(row.hash_ids) for row in rows), _block(rows)
    if blocks < longest + 1:
        raise UserError(f"{blocks} blocks; accepted: at least {longest + 1}, for the longest request")
    fleet, now = Fleet(chunk_tokens=block), 0.0
    router = Router(fleet, strategy, seed=seed, clock=lambda: now)
    names = [f"engine-{number}" for number in range(engines)]
    found = {name: SimulatedEngine(Cache(blocks, longest, SEQUENCES, policy), cost, block) for name in names}
    for name in names:
        fleet.add(name, model_id=MODEL, kind="sagellm", kv_tokens=blocks * block)
        fleet.set_state(name, True)
    served: list[Served] = []
    reported = -REPORT_SECONDS
    for request in _arrivals(rows, pace):
        now = request.sent
        for name, engine in found.items():
            engine.run(now)
            _tell(fleet, name, engine, now)
        if now >= reported + REPORT_SECONDS:
            reported = now
            for name, engine in found.items():
                fleet.set_load(name, engine.load)
        chosen = router.choose(request.ask).chosen
        assert chosen is not None
        fleet.sent(chosen, request.ask)
        found[chosen].submit(request)
        served.append(request)
    for engine in found.values():
        engine.run(np.inf)
    return Simulated(strategy, served, [engine.busy for engine in found.values()])


def _block(rows: Sequence[TraceRow]) -> int:
    """Tokens of a block of the trace."""
    return max(-(-row.input_length // len(row.hash_ids)) for row in rows)


def _arrivals(rows: Sequence[TraceRow], pace: float) -> Iterator[Served]:
    numbers: dict[tuple[str, int], int] = {}
    for number, row in enumerate(rows):
        own = [
            numbers.setdefault((row.tenant, i), len(numbers)) for i in row.hash_ids
        ]  # tenants share nothing
        ask = Ask(
            request_id=str(number),
            model=MODEL,
            prompt_tokens=row.input_length,
            chunks=own,
        )
        sent = (row.timestamp - rows[0].timestamp) / 1e3 / pace
        yield Served(ask, np.array(own, np.int32), row.output_length, sent)


def _tell(fleet: Fleet, name: str, engine: SimulatedEngine, now: float) -> None:
    """The fleet hears what happened until now."""
    while engine.said and engine.said[0][0] <= now:
        _, ended, request = engine.said.popleft()
        if not ended:
            fleet.first_token(name, request.ask, request.first - request.sent)
        else:
            spent = request.finished - request.first
            each = spent / (request.output - 1) if request.output > 1 else None
            fleet.finished(name, request.ask, request.output, each)
