"""An engine as another project would write it: the interface, and nothing of ours beneath it.

Its model says the prompt again and again, a token a character; with a temperature, its characters as the seed draws
them.
"""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import AsyncIterator, Sequence
from itertools import count, cycle, islice
from typing import Any

import numpy as np

from sagellm.batch import SamplingParams
from sagellm.engine.base import (
    BaseInferenceEngine,
    EngineState,
    GenerateRequest,
    GenerateResult,
    Health,
    KVHandle,
    Output,
    Prompt,
    TokenEvent,
)
from sagellm.engine.stats import EngineLoad
from sagellm.errors import UserError
from sagellm.schemas import KVCacheSchema, QuantizationProfile
from sagellm.target import CapabilityDescriptor

LONGEST = 256
SCHEMA = KVCacheSchema(dtype="float32", block_size=16, num_layers=1, num_kv_heads=1, head_dim=8)


class Echo(BaseInferenceEngine):
    def __init__(self):
        self.engine_id, self.model_id = "echo", "echo-1"
        self._state = EngineState.STARTING
        self._ids = count()
        self.running: set[str] = set()
        self.generated = 0

    @property
    def state(self) -> EngineState:
        return self._state

    async def start(self) -> None:
        self._state = EngineState.READY

    async def stop(self, drain_s: float = 30) -> None:
        self.running.clear()
        self._state = EngineState.STOPPED

    async def health(self) -> Health:
        return Health(self._state)

    def get_capability(self) -> CapabilityDescriptor:
        return CapabilityDescriptor(
            backend="echo",
            device="cpu",
            dtypes=("float32",),
            kernels=frozenset(),
            kv_dtypes=("float32",),
            block_sizes=(16,),
            max_sequence_length=LONGEST,
        )

    def get_kv_schema(self) -> KVCacheSchema:
        return SCHEMA

    def stats(self) -> EngineLoad:
        return EngineLoad(running=len(self.running), waiting=0, generated=self.generated)

    def load_quant_profile(self, profile: QuantizationProfile) -> None:
        if profile.method != "none":
            raise UserError(f"quantization method is {profile.method!r}; accepted: none")

    def output(self, prompt: str, how: SamplingParams) -> tuple[str, str]:
        """A text and its finish reason."""
        if self._state is not EngineState.READY:
            raise UserError(f"{self.engine_id} is {self._state.value}")
        if not 0 < len(prompt) <= LONGEST:
            raise UserError(f"the prompt has {len(prompt)} tokens; accepted: 1 to {LONGEST}")
        drawn = random.Random(how.seed)
        source = cycle(prompt) if how.greedy else (drawn.choice(prompt) for _ in count())
        text = "".join(islice(source, how.max_tokens))
        ends = [at for stop in how.stop if (at := text.find(stop)) >= 0]
        return (text[: min(ends)], "stop") if ends else (text, "length")

    async def events(self, work: GenerateRequest) -> AsyncIterator[TokenEvent]:
        text, reason = self.output(text_of(work.prompt), work.sampling)
        name = work.id or f"echo-{next(self._ids)}"
        self.running.add(name)
        try:
            for index, token in enumerate(text):
                await asyncio.sleep(0)
                if name not in self.running:
                    yield TokenEvent(name, index, (), "", finish_reason="abort")
                    return
                self.generated += 1
                last = index + 1 == len(text)
                yield TokenEvent(name, index, (ord(token),), token, finish_reason=reason if last else None)
            if not text:
                yield TokenEvent(name, 0, (), "", finish_reason=reason)
        finally:
            self.running.discard(name)

    def stream(self, work: Any, sampling: SamplingParams | None = None) -> AsyncIterator[TokenEvent]:
        return self.events(work)

    async def generate(self, work: Any, sampling: SamplingParams | None = None) -> GenerateResult:
        events = [event async for event in self.events(work)]
        text = "".join(event.text for event in events)
        output = Output(text, [ord(token) for token in text], events[-1].finish_reason)
        return GenerateResult(events[0].request_id, len(text_of(work.prompt)), [output])

    async def chat(self, messages: Sequence[dict], sampling: SamplingParams | None = None) -> GenerateResult:
        prompt = self.chat_prompt(messages)
        return await self.generate(GenerateRequest(prompt=prompt, sampling=sampling or SamplingParams()))

    def chat_prompt(self, messages: Sequence[dict]) -> Sequence[int]:
        return [ord(character) for character in messages[-1]["content"]]

    async def embed(
        self, texts: Sequence[Prompt], pooling: str = "mean", normalize: bool = True
    ) -> np.ndarray:
        seeds = [zlib.crc32(text_of(text).encode()) for text in texts]
        vectors = np.stack([np.random.default_rng(seed).normal(size=8) for seed in seeds])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    async def abort(self, request_id: str) -> bool:
        known = request_id in self.running
        self.running.discard(request_id)
        return known

    async def prefill(self, request: GenerateRequest) -> KVHandle:
        raise UserError("echo has no KV cache; accepted: generate()")

    def decode(self, request: GenerateRequest, handle: KVHandle) -> AsyncIterator[TokenEvent]:
        raise UserError("echo has no KV cache; accepted: stream()")


def text_of(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "".join(map(chr, prompt))
