"""The core's side of the conversation with a front: messages in, replies and steps out. Knows no transport.

Messages to the core are tuples: ("submit", number, request, again), ("abort", number, sample or None) and
("call", token, method, arguments). It answers with ("refused", number, text, full), ("ended", number, sample, reason)
where a request brings its whole output, ("step", StepEvents), ("reply", token, value) and ("failed", token, text).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from attrs import evolve

from sagellm.batch import Request
from sagellm.engine.core import EngineCore
from sagellm.engine.events import NOTHING, Failed, StepEvents
from sagellm.engine.link import Message
from sagellm.errors import QueueFull, RankLost, UserError

log = logging.getLogger(__name__)


class CoreService:
    """An engine core behind messages."""

    def __init__(self, core: EngineCore):
        self.core = core
        self._ids: dict[int, str] = {}

    def handle(self, message: Message) -> Iterator[Message]:
        """Do what a message says; its answers."""
        match message:
            case ("submit", number, request, again):
                yield from self._submit(number, request, again)
            case ("abort", number, sample):
                request_id = self._ids.get(number)
                if request_id is not None:
                    self.core.abort(request_id, sample)
            case ("call", token, method, arguments):
                try:
                    yield "reply", token, getattr(self, f"call_{method}")(*arguments)
                except UserError as error:
                    yield "failed", token, str(error)

    def _submit(self, number: int, request: Request, again: bool) -> Iterator[Message]:
        try:
            ended = self.core.ended(request)
            request = evolve(request, ended=(*request.ended, *ended))
            if len(request.ended) < request.sampling.n:
                self.core.submit(request, number, again=again)
                self._ids[number] = request.id
        except UserError as error:
            yield "refused", number, str(error), isinstance(error, QueueFull)
            return
        for sample, reason in ended.items():
            yield "ended", number, sample, reason

    def step(self) -> StepEvents:
        """One step. Should more than single requests fail, all that run or wait do, and the core goes on without."""
        try:
            events = self.core.advance()
        except RankLost:
            raise
        except Exception as error:
            log.exception("a step failed as a whole")
            events = self._abandon(f"{type(error).__name__}: {error}")
        if len(self._ids) > 2 * len(self.core.scheduler.numbers) + 64:
            live = set(self.core.scheduler.numbers.values())
            self._ids = {number: name for number, name in self._ids.items() if number in live}
        return events

    def _abandon(self, message: str) -> StepEvents:
        lost = [s for name in list(self.core.scheduler.numbers) for s in self.core.scheduler.abort(name)]
        failed = [Failed(s.number, s.sample, message) for s in lost]
        return StepEvents(*(getattr(NOTHING, n) for n in NOTHING.COLUMNS), failed=failed)

    # calls, by name

    def call_stats(self) -> Any:
        return self.core.stats()

    def call_reset_cache(self) -> int:
        return self.core.kv.reset()

    def call_set_kv_policy(self, name: str) -> None:
        self.core.kv.change_policy(name)

    def call_steps(self) -> list[dict[str, Any]]:
        return self.core.history.all()

    def call_step(self, number: int) -> dict[str, Any]:
        return self.core.history.step(self.core, number)

    def call_step_ir(self, number: int, after: str) -> str:
        return self.core.history.ir(self.core, number, after)

    def call_lookup(self, request_id: str) -> list[dict[str, Any]]:
        return self.core.history.lookup(request_id)

    def call_export(self, tokens: list[int], salt: str) -> tuple[int, bytes]:
        """(blocks, bytes) of the full blocks at the beginning of these tokens that are in the cache."""
        kv = self.core.kv
        found = kv.lookup(kv.chain(salt), np.array(tokens, np.int32), length=len(tokens))
        blocks = found.blocks[: found.blocks.index(-1)] if -1 in found.blocks else found.blocks
        if not blocks:
            return 0, b""
        values = self.core.cache.read(np.array(blocks))
        return len(blocks), values.contiguous().view(torch.uint8).numpy().tobytes()

    def call_insert(self, tokens: list[int], salt: str, values: bytes) -> int:
        """Put keys and values of full blocks into the cache; returns how many blocks are new."""
        core, kv = self.core, self.core.kv
        size = core.kv_schema.bytes_per_block
        if len(values) != len(tokens) // core.kv_schema.block_size * size:
            raise UserError(
                f"{len(values)} bytes for {len(tokens)} tokens; accepted: {size} for each full block"
            )

        def fill(at: np.ndarray, blocks: np.ndarray) -> None:
            core.executor.move()
            one = core.cache.read(np.zeros(1, np.int64))
            chosen = torch.from_numpy(np.frombuffer(values, np.uint8).reshape(-1, size)[at])
            core.cache.write(blocks, chosen.view(one.dtype).reshape(-1, *one.shape[1:]))

        return kv.adopt(np.array(tokens, np.int32), salt, fill)
