"""Who runs in the next step: first come, first served, under a token budget and with room reserved to the end."""

from __future__ import annotations

from collections import deque

import numpy as np

from sagellm.batch import Batch, Columns, Request
from sagellm.errors import UserError
from sagellm.runtime.pool import BlockPool


class Scheduler:
    """Owns the columns' rows. A request is admitted once all blocks that it can ever need are set aside."""

    def __init__(self, columns: Columns, pool: BlockPool, max_batched_tokens: int):
        self.columns, self.pool, self.budget = columns, pool, max_batched_tokens
        self.waiting: deque[tuple[Request, int]] = deque()
        self.requests: dict[int, Request] = {}
        self.ids: set[str] = set()
        """Requests that wait or run."""
        self._free = list(range(columns.capacity - 1, -1, -1))
        self._reserved = np.zeros(columns.capacity, np.int64)
        self._running = np.zeros(0, np.int64)

    def submit(self, request: Request, seed: int) -> None:
        """Queue a request, or refuse one that can never run."""
        c = self.columns
        if not request.prompt:
            raise UserError("the prompt is empty; accepted: at least one token")
        if len(request.prompt) >= c.max_length:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens; accepted: at most {c.max_length - 1}, "
                f"as the context is {c.max_length}"
            )
        if self._blocks(request) > len(self.pool.references) - 1:
            raise UserError(
                f"prompt and max_tokens need {self._blocks(request)} KV blocks; "
                f"accepted: at most {len(self.pool.references) - 1}"
            )
        self.ids.add(request.id)
        self.waiting.append((request, seed))

    def limit(self, request: Request) -> int:
        """Tokens of prompt and output at which the sequence ends."""
        return min(len(request.prompt) + request.sampling.max_tokens, self.columns.max_length)

    def _blocks(self, request: Request) -> int:
        return -(-self.limit(request) // self.columns.block_size)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.requests)

    def propose(self) -> Batch:
        """Admit what has room; every running sequence is a candidate for the step with all its tokens."""
        self._admit()
        c, rows = self.columns, self._running
        left = c.length[rows] - c.context[rows]
        decoding = (left == 1) & (c.length[rows] > c.prompt[rows])
        c.new[rows] = left
        return Batch(c, rows[decoding], rows[~decoding])

    def fit(self, batch: Batch) -> bool:
        """Cut the prefills to the token budget, decodes first, counting what will be forwarded; was there a cut?

        Sequences that take over tokens count without them and stand behind their leader, so none stays without one.
        """
        c, rows = self.columns, batch.prefill
        room = max(1, self.budget - len(batch.decode))
        if c.new[rows].sum() <= room:
            return False
        order = leaders_first(c, rows) if c.shared[rows].any() else rows
        ends = np.cumsum((c.new - c.shared)[order])
        if not len(ends) or ends[-1] <= room:
            return False
        whole = int(np.searchsorted(ends, room, side="right"))
        first = order[whole]
        part = room - (int(ends[whole - 1]) if whole else 0)
        c.new[first] = c.shared[first] + part
        kept = order[: whole + (c.new[first] > 0)]
        batch.prefill = rows[np.isin(rows, kept)]
        return True

    def _admit(self) -> None:
        while self.waiting and self._free:
            request, seed = self.waiting[0]
            blocks = self._blocks(request)
            if self._reserved.sum() + blocks > len(self.pool.references) - 1:
                return
            self.waiting.popleft()
            row = self._free.pop()
            self._reserved[row] = blocks
            self.columns.fill(row, request, seed=seed)
            self.requests[row] = request
            self._running = np.append(self._running, row)

    def abort(self, request_id: str) -> bool:
        """Drop a request wherever it is; False if there is none of this id."""
        if request_id not in self.ids:
            return False
        for entry in self.waiting:
            if entry[0].id == request_id:
                self.waiting.remove(entry)
                self.ids.discard(request_id)
                return True
        self.finish(next(row for row, request in self.requests.items() if request.id == request_id))
        return True

    def finish(self, row: int) -> None:
        """The sequence ends: its row and blocks are free for others."""
        c = self.columns
        self.pool.release(c.blocks[row, : c.owned[row]])
        c.owned[row] = c.length[row] = c.context[row] = 0
        c.blocks[row] = 0
        self._reserved[row] = 0
        self._running = self._running[self._running != row]
        self.ids.discard(self.requests.pop(row).id)
        self._free.append(row)


def leaders_first(columns: Columns, rows: np.ndarray) -> np.ndarray:
    """The rows in their order, except that a leader stands before the rows that follow it."""
    order: dict[int, None] = {}
    for row in rows.tolist():
        chain = [row]
        while columns.leader[chain[-1]] >= 0:
            chain.append(int(columns.leader[chain[-1]]))
        order |= dict.fromkeys(reversed(chain))
    return np.array(list(order), rows.dtype)
