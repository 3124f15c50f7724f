"""`SageLLMEngine`: text in, text out. The one object that a script, a server or a control plane holds."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, overload

import numpy as np
from attrs import evolve

from sagellm.batch import POOLINGS, Request, SamplingParams
from sagellm.config import AskedKV, EngineConfig
from sagellm.engine.base import (
    BaseInferenceEngine,
    EngineState,
    GenerateRequest,
    GenerateResult,
    Health,
    KVHandle,
    Prompt,
    TokenEvent,
)
from sagellm.engine.front import Front, Journal
from sagellm.engine.grammars import Grammars
from sagellm.engine.link import LINKS, InlineLink
from sagellm.engine.load import Progress
from sagellm.engine.stats import EngineStats
from sagellm.engine.tokenizer import TOKENIZER_FILE, Tokenizer
from sagellm.errors import UserError, unknown
from sagellm.grammar import Grammar
from sagellm.schemas import KVCacheSchema, QuantizationProfile
from sagellm.target import CapabilityDescriptor

CALL_SECONDS = 120.0
"""A core that does not answer within this is taken for stuck."""


class Stream:
    """One request's output as it comes, for `for` and for `async for`. Closing it, or letting go, ends the request."""

    def __init__(self, engine: SageLLMEngine, journal: Journal):
        self._engine, self._journal = engine, journal
        self._over = False

    @property
    def request_id(self) -> str:
        return self._journal.request.id

    @property
    def result(self) -> GenerateResult:
        """What there is so far; all of it once the stream has ended."""
        return self._journal.result

    @property
    def resumed(self) -> str:
        """The text before the first event's: what `GenerateRequest.resume` shows."""
        return self._journal.resumed

    def __iter__(self) -> Iterator[TokenEvent]:
        return self

    def __next__(self) -> TokenEvent:
        event = None if self._over else self._journal.events.get()
        if event is None or self._journal.refused is not None:
            self._finish()
            raise StopIteration
        return event

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        journal = self._journal
        if journal.wake is None:
            journal.wake = asyncio.get_running_loop(), asyncio.Event()
        while not self._over and journal.events.empty():
            await journal.wake[1].wait()
            journal.wake[1].clear()
        event = None if self._over else journal.events.get()
        if event is None or journal.refused is not None:
            self._finish()
            raise StopAsyncIteration
        return event

    def wait(self) -> GenerateResult:
        """Block until the request has ended; its result."""
        self._journal.done.wait()
        self._finish()
        return self.result

    def _finish(self) -> None:
        self._over = True
        if self._journal.refused is not None:
            raise self._journal.refused

    def close(self) -> None:
        self._over = True
        self._engine.front.abort(self._journal)

    async def aclose(self) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._journal.done.is_set():
            self.close()


class SageLLMEngine(BaseInferenceEngine):
    """One model on one device.

    `SageLLMEngine("builtin").generate(["Once upon a time"])` needs nothing else. A list of prompts is continued in
    one batch and the call returns when all have ended; one `GenerateRequest` gives something to await. Both kinds
    of call, from any thread and event loop, may be under way at once and share the engine's steps.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        device: str | None = None,
        kv_schema: AskedKV = None,
        config: EngineConfig | str | Path | Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        *,
        engine_id: str = "sagellm",
        **settings: Any,
    ):
        """`settings` are fields of `EngineConfig`, of which `device` is `target`; they go before those of `config`.

        Where `config` is no `EngineConfig`, the environment counts too: see `EngineConfig.load`. `kv_schema` goes
        before `kv_dtype` and `block_size`; what it says of the model must be so.
        """
        if device is not None and "target" in settings:
            raise UserError(f"device is {device!r} and target {settings['target']!r}; accepted: one of them")
        settings |= {k: v for k, v in (("model", model), ("target", device)) if v is not None}
        if isinstance(kv_schema, str):
            settings["kv_dtype"] = kv_schema
        if isinstance(config, EngineConfig):
            config = config.changed(**settings)
        else:
            config = EngineConfig.load(config, os.environ, **settings)
        if kv_schema is not None and not isinstance(kv_schema, str):
            from sagellm.engine.planner import Planner

            checked = Planner(config, kv_schema).kv_schema
            config = config.changed(kv_dtype=checked.dtype, block_size=checked.block_size)
        self.config = config
        self.engine_id = engine_id
        self._state = EngineState.STARTING
        self._ids, self._seeds = count(), np.random.default_rng(self.config.seed)
        self._open(progress)

    def _open(self, progress: Progress | None) -> None:
        make = LINKS[self.config.core]
        self.front = Front(lambda: make(self.config, progress), self.config.max_restarts)
        folder = self.front.link.info.folder
        self.tokenizer = self.front.tokenizer = (
            Tokenizer.load(folder) if (folder / TOKENIZER_FILE).exists() else None
        )
        """None where the model has none: it takes and gives token ids."""
        self._grammars = Grammars(lambda: self._tokenizer("a grammar"), self.vocab_size, ())
        self._finalizer = weakref.finalize(self, Front.close, self.front)
        self._state = EngineState.READY

    # what it is

    @property
    def model_id(self) -> str:
        return self.front.link.info.model_id

    @property
    def state(self) -> EngineState:
        return EngineState.ERROR if self.front.error else self._state

    @property
    def core(self) -> Any:
        """The `EngineCore`, where it is in this process; to look at while nothing runs."""
        assert isinstance(self.front.link, InlineLink), "the core is in a process of its own"
        return self.front.link.core

    async def health(self) -> Health:
        return Health(self.state, self.front.error)

    def get_capability(self) -> CapabilityDescriptor:
        return self.front.link.info.capability

    @property
    def vocab_size(self) -> int:
        """Token ids of the model are below this."""
        return self.front.link.info.vocab_size

    def get_kv_schema(self) -> KVCacheSchema:
        return self.front.link.info.kv_schema

    def stats(self) -> EngineStats:
        return evolve(self._call("stats"), restarts=self.front.restarts, finished=dict(self.front.finished))

    def metrics(self) -> str:
        """`stats` in Prometheus' text form."""
        from sagellm.engine.metrics import exposition

        return exposition(self.stats(), {"engine": self.engine_id, "model": self.model_id})

    def load_quant_profile(self, profile: QuantizationProfile) -> None:
        if profile.method != "none":
            backend = self.get_capability().backend
            raise UserError(f"quantization method {profile.method!r} on {backend}; accepted: none")

    def steps(self) -> list[dict[str, Any]]:
        """The last `explain_steps` steps, the latest first: what ran, whether its plan was found, what passes said."""
        return self._call("steps")

    def step(self, number: int) -> dict[str, Any]:
        """One of these, with what each pass made of its graphs and how long that takes."""
        return self._call("step", number)

    def step_ir(self, number: int, after: str = "") -> str:
        """A step's graph as text behind this pass, or as `lowered`; of a model pass, its model graph."""
        return self._call("step_ir", number, after)

    def cache_lookup(self, request_id: str) -> list[dict[str, Any]]:
        """Block by block, what one of the last requests found in the KV cache when it began, and why not."""
        return self._call("lookup", request_id)

    def _call(self, method: str, *arguments: Any) -> Any:
        return self.front.call(method, *arguments).result(CALL_SECONDS)

    # many prompts, blocking

    @overload
    def generate(self, work: GenerateRequest) -> Awaitable[GenerateResult]: ...

    @overload
    def generate(
        self, work: Prompt | Sequence[Prompt], sampling: SamplingParams | None = None
    ) -> list[GenerateResult]: ...

    def generate(self, work, sampling=None):
        """A list of prompts: continue all in one batch; results in their order. A request: its result, to await."""
        if isinstance(work, GenerateRequest):
            return self._result(self.stream(work))
        some = [work] if isinstance(work, str) else list(work)
        if some and all(isinstance(p, int) for p in some):
            some = [some]
        streams: list[Stream] = []
        try:
            for index, prompt in enumerate(some):
                how = sampling or SamplingParams()
                if index and how.seed is not None:
                    how = evolve(how, seed=(how.seed + index) % 2**63)
                streams.append(self.stream(prompt, how))
            self._call("stats")
            for stream in streams:
                if stream._journal.refused:
                    raise stream._journal.refused
        except UserError as error:
            refused = next((i for i, s in enumerate(streams) if s._journal.refused), len(streams))
            for stream in streams:
                stream.close()
            which = f"prompt {refused + 1} of {len(some)}: " if len(some) > 1 else ""
            raise type(error)(f"{which}{error}") from error
        return [stream.wait() for stream in streams]

    # one request

    def stream(self, work: Prompt | GenerateRequest, sampling: SamplingParams | None = None) -> Stream:
        """A request's output as it comes, for `for` or `async for`; a refusal is raised by the first step of it."""
        if self._state is not EngineState.READY:
            raise UserError(f"the engine is {self._state.value}; accepted: requests while it is ready")
        if not isinstance(work, GenerateRequest):
            work = GenerateRequest(prompt=work, sampling=sampling or SamplingParams())
        how = work.sampling
        if how.stop:
            self._tokenizer("stop strings")
        if how.seed is None:
            how = evolve(how, seed=int(self._seeds.integers(2**63)))
        prompt = self.encode(work.prompt)
        self._check_resume(prompt, work.resume)
        request = Request(
            f"request-{next(self._ids)}" if work.id is None else work.id,
            prompt,
            how,
            work.priority,
            work.deadline,
            work.salt,
            [list(work.resume)] if work.resume else [],
            pooling=work.pooling,
        )
        return Stream(self, self.front.open(request))

    def _check_resume(self, prompt: list[int], resume: Sequence[int]) -> None:
        longest, known = self.get_capability().max_sequence_length, len(prompt) + len(resume)
        if resume and longest and known > longest:
            raise UserError(
                f"prompt and resume have {known} tokens; accepted: at most {longest}, the context"
            )
        for token in resume:
            if token >= self.vocab_size:
                raise UserError(f"token id {token} in resume; accepted: 0 to {self.vocab_size - 1}")

    async def _result(self, stream: Stream) -> GenerateResult:
        async for _ in stream:
            pass
        return stream.result

    async def chat(self, messages: Sequence[dict], sampling: SamplingParams | None = None) -> GenerateResult:
        return await self._result(self.stream(self.chat_prompt(messages), sampling))

    def chat_prompt(self, messages: Sequence[dict]) -> list[int]:
        """Token ids of a conversation in the model's chat template."""
        tokenizer = self._tokenizer("a conversation")
        return tokenizer.encode(tokenizer.apply_chat_template(list(messages)), add_special_tokens=False)

    def encode(self, prompt: Prompt) -> list[int]:
        return self._tokenizer("text").encode(prompt) if isinstance(prompt, str) else list(prompt)

    def check_grammar(self, grammar: Grammar) -> None:
        """Raises UserError where outputs cannot follow it. Takes up to a second; the engine goes on meanwhile."""
        self._grammars.matcher(grammar)

    def _tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(
                f"{what} for {self.model_id!r}, which has no {TOKENIZER_FILE}; accepted: token ids"
            )
        return self.tokenizer

    async def embed(
        self, texts: Sequence[Prompt], pooling: str = "mean", normalize: bool = True
    ) -> np.ndarray:
        if not pooling:
            raise unknown("pooling", pooling, POOLINGS[1:])
        streams = [self.stream(GenerateRequest(prompt=text, pooling=pooling)) for text in texts]
        results = await asyncio.gather(*map(self._result, streams))
        for result in results:
            if result.embedding is None:
                raise UserError(f"no embedding: {result.error or result.finish_reason}")
        vectors = np.array([result.embedding for result in results], np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors

    async def abort(self, request_id: str) -> bool:
        journal = self.front.find(request_id)
        return journal is not None and self.front.abort(journal)

    # a prompt's keys and values, elsewhere

    async def prefill(self, request: GenerateRequest) -> KVHandle:
        tokens = [*self.encode(request.prompt), *request.resume]
        how = evolve(request.sampling, max_tokens=1, min_tokens=0, n=1)
        once = evolve(request, prompt=tokens, resume=(), sampling=how)
        await self._result(self.stream(once))
        blocks, values = await asyncio.wrap_future(self.front.call("export", tokens, request.salt))
        schema = self.get_kv_schema()
        return KVHandle(
            model_id=self.model_id,
            schema=schema,
            tokens=tokens[: blocks * schema.block_size],
            values=np.frombuffer(values, np.uint8),
        )

    async def decode(self, request: GenerateRequest, handle: KVHandle) -> AsyncIterator[TokenEvent]:
        mine = (self.model_id, self.get_kv_schema())
        if (handle.model_id, handle.schema) != mine:
            raise UserError(
                f"keys and values of {handle.model_id!r}, {handle.schema}; accepted: those of {mine[0]!r}, {mine[1]}"
            )
        await asyncio.wrap_future(
            self.front.call("insert", handle.tokens, request.salt, handle.values.tobytes())
        )
        async for event in self.stream(request):
            yield event

    # its life

    async def start(self) -> None:
        if self._state is EngineState.STOPPED:
            self._state = EngineState.STARTING
            await asyncio.to_thread(self._open, None)

    def drain(self, timeout: float = 30) -> bool:
        """Take nothing new and wait until all requests have ended, at most so many seconds; whether they have."""
        if self._state is EngineState.READY:
            self._state = EngineState.DRAINING
        return self.front.wait_until_idle(timeout)

    async def stop(self, drain_s: float = 30) -> None:
        await asyncio.to_thread(self.drain, drain_s)
        await asyncio.to_thread(self.shutdown)

    def shutdown(self) -> None:
        """End now; requests that run end with `abort`."""
        self._state = EngineState.STOPPED
        self._finalizer()

    def reset_prefix_cache(self) -> int:
        """Forget what no request holds, as after new weights; returns how many blocks that were."""
        return self._call("reset_cache")

    def set_kv_policy(self, name: str) -> None:
        """From now on KV blocks leave by this policy (`lru`, `lifetime`, ...); what is in the cache stays there.

        UserError where the name is none, and where the pipeline has no kv-eviction-placement. A core that is started
        again after a crash has the pipeline's policy.
        """
        self._call("set_kv_policy", name)

    def __enter__(self) -> SageLLMEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
