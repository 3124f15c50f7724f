"""Who runs in the next step, who waits, and who gives way when the KV cache is full.

State is in columns; Python work per request happens when a request comes, begins, is put back or ends, never per step.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator

import numpy as np
from attrs import define, field

from sagellm.batch import Batch, Columns, Request
from sagellm.errors import QueueFull, UserError
from sagellm.kv.prefix import Chain, Lookup
from sagellm.runtime.forecast import Hope, Lengths, peak_blocks
from sagellm.runtime.kv import KVManager

ORDERS = ("fcfs", "priority", "deadline")


@define(eq=False)
class Sequence:
    """One sample of a request, from submission to its end."""

    request: Request
    number: int
    sample: int
    seed: int
    arrived: float
    rank: float
    """What comes before the request's number in the order: its priority or deadline; 0 under fcfs."""
    chain: Chain
    known: np.ndarray
    """int32: prompt and output so far, while it waits."""
    computed: int = 0
    """How many of these were in the cache before it was put back."""
    parent: int = -1
    """The row whose prompt it shares, when it begins as a fork."""
    row: int = -1
    dropped: bool = False
    hit: int = 0
    """Known tokens found in the cache when it began or went on."""
    miss: str = ""
    first_token: float = 0.0
    last_token: float = 0.0

    @property
    def key(self) -> tuple[float, int, int]:
        return self.rank, self.number, self.sample


@define
class SchedulerCounts:
    preemptions: int = 0
    refused: int = 0
    began: list[Sequence] = field(factory=list)
    """Sequences that got a row since the last step, for whoever reports it."""


class Scheduler:
    """Owns the columns' rows.

    The first sequence in the order is never put back, and it fits alone: so each step brings some sequence nearer to
    its end, and each sequence comes first one day.
    """

    def __init__(
        self,
        columns: Columns,
        kv: KVManager,
        max_batched_tokens: int,
        *,
        order: str = "fcfs",
        max_queue: int = 1024,
        end_tokens: tuple[int, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        self.columns, self.kv, self.budget = columns, kv, max_batched_tokens
        self.order, self.max_queue, self.end_tokens, self.clock = order, max_queue, end_tokens, clock
        self.sequences: dict[int, Sequence] = {}
        """By row."""
        self.numbers: dict[str, int] = {}
        """Of the requests that wait or run."""
        self.counts = SchedulerCounts()
        self.lengths, self.hope = Lengths(), Hope()
        self.waiting = 0
        self._queue: list[tuple[tuple, Sequence]] = []
        self._forks: dict[int, list[Sequence]] = {}
        """Samples that wait for their request's prompt to be computed, by number."""
        self._alive: dict[int, list[Sequence]] = {}
        self._free = list(range(columns.capacity - 1, -1, -1))
        self._rank = np.zeros(columns.capacity)
        self._pooled_turn = False
        """Prompts whose vectors are wanted have every second step, if there are any."""
        self._running = np.zeros(0, np.int64)
        """Rows in the order's order."""

    # requests come and go

    def submit(self, request: Request, number: int, seed: int, *, again: bool = False) -> None:
        """Queue a request, or refuse one that can never run, or that finds the queue full.

        `again`: it was accepted before its core was lost, so the queue's limit does not count.
        """
        c = self.columns
        if request.id in self.numbers:
            raise UserError(f"request id {request.id!r} is in use; accepted: a new one")
        if request.pooling and len(request.prompt) > self.budget:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens; accepted: at most {self.budget} where its vector is "
                "wanted (max_batched_tokens)"
            )
        if not request.prompt:
            raise UserError("the prompt is empty; accepted: at least one token")
        if len(request.prompt) >= c.max_length:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens; accepted: at most {c.max_length - 1}, "
                f"as the context is {c.max_length}"
            )
        needed = -(-min(len(request.prompt) + request.sampling.max_tokens, c.max_length) // c.block_size)
        if needed > self.kv.pool.total:
            raise UserError(
                f"prompt and max_tokens need {needed} KV blocks; accepted: at most {self.kv.pool.total}"
            )
        now = self.clock()
        rank = {"fcfs": 0.0, "priority": float(request.priority), "deadline": now + request.deadline}
        sequences = [
            Sequence(
                request,
                number,
                sample,
                seed,
                now,
                rank[self.order],
                self.kv.chain(request.salt),
                np.array(request.prompt + request.brought(sample), np.int32),
            )
            for sample in range(request.sampling.n)
            if sample not in request.ended
        ]
        if self.waiting + len(sequences) > self.max_queue and not again:
            self.counts.refused += 1
            raise QueueFull(
                f"{self.waiting} sequences wait and this request has {len(sequences)}; "
                f"accepted: at most {self.max_queue} in all"
            )
        self.numbers[request.id] = number
        self._alive[number] = list(sequences)
        self.waiting += len(sequences)
        self._enqueue(sequences[0])
        if len(sequences) > 1:
            self._forks[number] = sequences[1:]

    def _enqueue(self, sequence: Sequence) -> None:
        heapq.heappush(self._queue, (sequence.key, sequence))

    @property
    def busy(self) -> bool:
        return bool(self.numbers)

    @property
    def running(self) -> int:
        return len(self._running)

    def abort(self, request_id: str) -> list[Sequence]:
        """Drop a request wherever it is, with all its samples; returns those that had not ended."""
        number = self.numbers.get(request_id)
        if number is None:
            return []
        ended = list(self._alive[number])
        for sequence in ended:
            self._drop(sequence)
        return ended

    def drop_sample(self, request_id: str, sample: int) -> list[Sequence]:
        """Drop one sample of a request; the others go on."""
        alive = self._alive.get(self.numbers.get(request_id, -1), [])
        ended = [sequence for sequence in alive if sequence.sample == sample]
        for sequence in ended:
            self._drop(sequence)
        return ended

    def _drop(self, sequence: Sequence) -> None:
        if sequence.row >= 0:
            self._vacate(sequence.row)
        else:
            sequence.dropped = True
            self.waiting -= 1
        self._end(sequence)

    def finish(self, row: int) -> Sequence:
        """The sequence ends: its row and blocks are free for others."""
        sequence = self._vacate(row)
        self.hope.fulfilled()
        self.lengths.add(len(sequence.known) - len(sequence.request.prompt))
        self._end(sequence)
        return sequence

    def _end(self, sequence: Sequence) -> None:
        alive, forks = self._alive[sequence.number], self._forks.get(sequence.number, [])
        alive.remove(sequence)
        if sequence in forks:
            forks.remove(sequence)
        elif forks:
            for fork in self._forks.pop(sequence.number):
                self._enqueue(fork)
        if not alive:
            del self._alive[sequence.number], self.numbers[sequence.request.id]
            self._forks.pop(sequence.number, None)

    def _vacate(self, row: int) -> Sequence:
        c, sequence = self.columns, self.sequences.pop(row)
        sequence.known = c.tokens[row, : c.length[row]].copy()
        sequence.first_token, sequence.last_token = float(c.first_token[row]), float(c.last_token[row])
        self.kv.release(row)
        c.length[row], c.number[row], sequence.row = 0, -1, -1
        self._running = self._running[self._running != row]
        self._free.append(row)
        return sequence

    def preempt(self, row: int) -> None:
        """Put a running sequence back into the queue; what it computed stays in the cache as long as there is room."""
        context = int(max(self.columns.context[row], self.columns.computed[row]))
        sequence = self._vacate(row)
        sequence.computed, sequence.parent = context, -1
        self.counts.preemptions += 1
        self.waiting += 1
        self._enqueue(sequence)

    # a step

    def propose(self) -> Batch:
        """Admit what has room; every running sequence is a candidate for the step with all its tokens."""
        self.kv.expect(None)
        if self._queue:
            self._admit()
        c, rows = self.columns, self._running
        self._pooled_turn = not self._pooled_turn
        pooled = c.pooling[rows] > 0
        if pooled.any() and (self._pooled_turn or pooled.all()):
            return self._propose_pooled(rows[pooled])
        rows = rows[~pooled]
        left = c.length[rows] - c.context[rows]
        decoding = (left == 1) & (c.length[rows] > c.prompt[rows])
        c.new[rows], c.drafted[rows] = left, 0
        batch = Batch(c, rows[decoding], rows[~decoding])
        batch.spare = self.budget - len(rows), self.kv.pool.available - 2 * len(rows)
        return batch

    def _propose_pooled(self, rows: np.ndarray) -> Batch:
        """Prompts whose vectors are wanted, whole and pooled alike, as many as the budget holds; the first fits."""
        c = self.columns
        rows = rows[c.pooling[rows] == c.pooling[rows[0]]]
        rows = rows[np.cumsum(c.length[rows]) <= self.budget]
        c.new[rows], c.drafted[rows] = c.length[rows], 0
        return Batch(c, rows[:0], rows)

    def fit(self, batch: Batch) -> bool:
        """Cut the batch to the token budget and to the KV blocks that can be had; did it change?

        What was decided about the batch before does not hold for what is left of it.
        """
        if self._cut(batch):
            return True
        pool = self.kv.pool
        if len(batch.decode) + batch.new_tokens <= pool.available:
            return False
        short = self.kv.growth(batch) - pool.available
        if short <= 0:
            return False
        row = self._victim(short)
        self.preempt(row)
        self.hope.disappointed()
        batch.decode, batch.prefill = (rows[rows != row] for rows in (batch.decode, batch.prefill))
        return True

    def place(self, batch: Batch) -> None:
        """Settle which blocks move for the step."""
        self.kv.place(batch)

    def committed(self, batch: Batch) -> None:
        """After the step: prompts that were computed can be found, and their other samples may begin."""
        c = self.columns
        for row in batch.prefill.tolist():
            self.kv.publish(row)
            number = int(c.number[row])
            if number in self._forks and c.context[row] >= c.prompt[row]:
                for fork in self._forks.pop(number):
                    fork.parent = row
                    self._enqueue(fork)

    def _cut(self, batch: Batch) -> bool:
        """Cut the prefills to the token budget, counting what will be forwarded.

        The first in the order leaves at most half of the room to those that have fewer tokens left than it, the
        shortest first: a long prompt makes way for short ones and is never starved by them. Sequences that take
        over tokens count without them and stand behind their leader, so none stays without one.
        """
        c, rows = self.columns, batch.prefill
        if not len(rows):
            return False
        if self._wait_for_leaders(rows):
            return True
        room = max(1, self.budget - len(batch.decode))
        if c.new[rows].sum() <= room:
            return False
        forward = c.new[rows] - c.shared[rows]
        order = rows[np.concatenate([[0], 1 + np.argsort(forward[1:], kind="stable")])]
        if c.shared[rows].any():
            order = leaders_first(c, order)
        forward = (c.new - c.shared)[order]
        if forward.sum() <= room:
            return False
        shorter = int(forward[forward < forward[0]].sum())
        first = min(int(forward[0]), max((room + 1) // 2, room - shorter))
        granted = np.clip(room - first - np.cumsum(forward[1:]) + forward[1:], 0, forward[1:])
        granted = np.concatenate([[first], granted])
        cut = order[granted < forward]
        c.new[order] = np.where(granted < forward, c.shared[order] + granted, c.new[order])
        leaders = cut[np.isin(cut, c.leader[rows])]
        whole = (c.context[leaders] + c.new[leaders]) // c.block_size * c.block_size - c.context[leaders]
        c.new[leaders] = np.where(whole > 0, whole, c.new[leaders])  # followers take over whole blocks
        alone = (c.leader[rows] >= 0) & (c.new[c.leader[rows]] == 0)
        while alone.any():  # none follows a leader that is not in the step
            c.new[rows[alone]] = 0
            alone = (c.leader[rows] >= 0) & (c.new[c.leader[rows]] == 0) & (c.new[rows] > 0)
        batch.prefill = rows[c.new[rows] > 0]
        return True

    def _wait_for_leaders(self, rows: np.ndarray) -> bool:
        """Who follows a leader up to the end of its chunk goes no further: the next chunk may be common too."""
        c = self.columns
        followers = rows[c.leader[rows] >= 0]
        if not len(followers):
            return False
        leaders = c.leader[followers]
        ends = c.context[leaders] + c.new[leaders]
        waits = (ends < c.length[leaders]) & (c.context[followers] + c.shared[followers] == ends)
        waiting = followers[waits & (c.new[followers] > c.shared[followers])]
        c.new[waiting] = c.shared[waiting]
        return bool(len(waiting))

    def _admit(self) -> None:
        while self._queue:
            sequence = self._queue[0][1]
            if sequence.dropped:
                heapq.heappop(self._queue)
                continue
            lookup = self._lookup(sequence)
            if not self._free or not self._has_room(sequence, lookup):
                row = self._lower_rank(sequence)
                if row is None:
                    self.kv.expect(sequence.chain, sequence.known, lookup)
                    return
                self.preempt(row)
                continue
            heapq.heappop(self._queue)
            self._begin(sequence, lookup)

    def _lookup(self, sequence: Sequence) -> Lookup:
        if sequence.request.pooling:
            return Lookup([], [], 0, "its vector wants the whole prompt")
        if sequence.request.sampling.prompt_logprobs is not None and sequence.computed == 0:
            return Lookup([], [], 0, "prompt_logprobs wants the whole prompt")
        return self.kv.lookup(sequence.chain, sequence.known, length=len(sequence.known))

    def _begin(self, sequence: Sequence, lookup: Lookup) -> None:
        c, row = self.columns, self._free.pop()
        c.fill(
            row,
            sequence.request,
            seed=sequence.seed,
            number=sequence.number,
            sample=sequence.sample,
            end=self.end_tokens,
        )
        c.length[row] = len(sequence.known)
        c.tokens[row, : len(sequence.known)] = sequence.known
        c.computed[row] = sequence.computed
        c.arrived[row] = sequence.arrived
        c.first_token[row], c.last_token[row] = sequence.first_token, sequence.last_token
        if self._forkable(sequence):
            self.kv.fork(row, sequence.parent, sequence.chain)
            sequence.miss = "forked from the request's first sample"
        else:
            self.kv.attach(row, sequence.chain, lookup)
            sequence.miss = lookup.miss
        sequence.hit, sequence.row = int(c.context[row]), row
        self.waiting -= 1
        self.sequences[row] = sequence
        self.counts.began.append(sequence)
        self._rank[row] = sequence.rank
        rows = np.append(self._running, row)
        self._running = rows[np.lexsort((c.sample[rows], c.number[rows], self._rank[rows]))]

    def _forkable(self, sequence: Sequence) -> bool:
        """Does the row that computed its prompt still hold it?"""
        c, row = self.columns, sequence.parent
        return row >= 0 and c.number[row] == sequence.number and c.context[row] >= c.prompt[row]

    # memory

    def _has_room(self, sequence: Sequence, lookup: Lookup) -> bool:
        """Would all that runs, and this one, get through without another having to give way?"""
        if not len(self._running):
            return True
        c, rows, pool = self.columns, self._running, self.kv.pool
        request, known = sequence.request, len(sequence.known)
        if self._forkable(sequence):
            held = len(request.prompt) // c.block_size
        else:
            held = self.kv.held(lookup)
        limit = min(len(request.prompt) + request.sampling.max_tokens, c.max_length)
        ends = self.lengths.ends(
            np.append(c.prompt[rows], len(request.prompt)),
            np.append(c.length[rows], known),
            np.append(c.limit[rows], limit),
        )
        refs = pool.references[c.blocks[rows]]
        used = np.arange(c.max_blocks) < c.owned[rows, None]
        credit = np.where(used & (refs > 1), 1 - 1 / np.maximum(refs, 1), 0).sum(1)
        lengths = np.append(c.length[rows], known)
        now = -(-known // c.block_size) - held
        if now > pool.available:
            return False
        return (
            peak_blocks(lengths, ends, np.append(credit, held), c.block_size) <= pool.total * self.hope.part
        )

    def _victim(self, short: int) -> int:
        """The running row whose way back costs least among those that free enough blocks; never the first in order."""
        rows = self._running[1:]
        if self.order == "priority":
            rows = rows[self._rank[rows] == self._rank[rows].max()]
        freed, cost = self._ways_back(rows)
        enough = freed >= short
        if enough.any():
            rows, cost = rows[enough], cost[enough]
        else:
            cost = cost / np.maximum(freed, 0.5)
        return int(rows[len(rows) - 1 - int(np.argmin(cost[::-1]))])

    def _ways_back(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Blocks that a row alone holds, and the tokens of these to be computed or fetched again."""
        c = self.columns
        refs = self.kv.pool.references[c.blocks[rows]]
        freed = ((np.arange(c.max_blocks) < c.owned[rows, None]) & (refs == 1)).sum(1)
        return freed, np.minimum(freed * c.block_size, c.context[rows])

    def _lower_rank(self, sequence: Sequence) -> int | None:
        """Under `priority`, the row to put back for one of higher priority."""
        rows = self._running
        if self.order != "priority" or not len(rows):
            return None
        rows = rows[self._rank[rows] > sequence.rank]
        if not len(rows):
            return None
        rows = rows[self._rank[rows] == self._rank[rows].max()]
        return int(rows[len(rows) - 1 - int(np.argmin(self._ways_back(rows)[1][::-1]))])

    def queued(self) -> Iterator[Sequence]:
        """Sequences that wait, in no order."""
        yield from (s for _, s in self._queue if not s.dropped)
        for forks in self._forks.values():
            yield from (s for s in forks if not s.dropped)


def leaders_first(columns: Columns, rows: np.ndarray) -> np.ndarray:
    """The rows in their order, except that a leader stands before the rows that follow it."""
    order: dict[int, None] = {}
    for row in rows.tolist():
        chain = [row]
        while columns.leader[chain[-1]] >= 0:
            chain.append(int(columns.leader[chain[-1]]))
        order |= dict.fromkeys(reversed(chain))
    return np.array(list(order), rows.dtype)
