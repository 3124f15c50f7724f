"""`SageLLMEngine`: text in, text out. The front over a core: tokenizer, chat template, stop strings, timings."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from attrs import define, evolve, field, frozen

from sagellm.batch import Request, SamplingParams
from sagellm.config import AskedKV, EngineConfig
from sagellm.engine.core import EngineCore, Progress, TokenEvent
from sagellm.engine.detokenizer import Detokenizer
from sagellm.engine.planner import Planner
from sagellm.engine.tokenizer import Tokenizer
from sagellm.errors import UserError
from sagellm.schemas import KVCacheSchema
from sagellm.target import CapabilityDescriptor

Prompt = str | Sequence[int]


@frozen
class TextEvent:
    """A piece of a request's output."""

    request_id: str
    text: str
    """Text that is complete now; may be empty."""
    token: int
    finish_reason: str | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@define
class GenerateResult:
    """A finished request."""

    request_id: str
    prompt_tokens: int
    text: str = ""
    token_ids: list[int] = field(factory=list)
    finish_reason: str | None = None
    """`stop`: an end token or stop string; `length`: max_tokens or the context's end."""
    logprobs: list[float] = field(factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(factory=list)
    ttft: float = 0.0
    """Seconds from submission to the first token."""
    tpot: float = 0.0
    """Mean seconds per token after the first."""


@define
class _Stream:
    detokenizer: Detokenizer
    result: GenerateResult
    began: float
    first: float = 0.0
    unread: list[TextEvent] = field(factory=list)


class SageLLMEngine:
    """One model on one device.

    `SageLLMEngine("builtin").generate(["Once upon a time"])` needs nothing else.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        device: str | None = None,
        kv_schema: AskedKV = None,
        config: EngineConfig | str | Path | Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        **settings,
    ):
        """`settings` are fields of `EngineConfig`, of which `device` is `target`; they go before those of `config`.

        Where `config` is no `EngineConfig`, the environment counts too: see `EngineConfig.load`. `kv_schema` goes
        before `kv_dtype` and `block_size`; what it says of the model must be so.
        """
        if device is not None and "target" in settings:
            raise UserError(f"device is {device!r} and target {settings['target']!r}; accepted: one of them")
        settings |= {k: v for k, v in (("model", model), ("target", device)) if v is not None}
        if isinstance(config, EngineConfig):
            config = config.changed(**settings)
        else:
            config = EngineConfig.load(config, os.environ, **settings)
        if kv_schema is not None:
            checked = Planner(config, kv_schema).kv_schema  # before weights are read
            config = config.changed(kv_dtype=checked.dtype, block_size=checked.block_size)
        self.core = EngineCore(config, progress)
        self.tokenizer = Tokenizer.load(self.core.folder)
        self._streams: dict[str, _Stream] = {}
        self._ids = count()

    @property
    def model_id(self) -> str:
        return self.core.model.name

    def get_capability(self) -> CapabilityDescriptor:
        return self.core.backend.capability

    def get_kv_schema(self) -> KVCacheSchema:
        return self.core.kv_schema

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | None = None
    ) -> list[GenerateResult]:
        """Continue all prompts in one batch; results in the prompts' order."""
        some = [prompts] if isinstance(prompts, str) else list(prompts)
        if some and all(isinstance(p, int) for p in some):
            some = [some]
        ids = self._submit(some, sampling)
        results = [self._streams[i].result for i in ids]
        for _ in self._events(ids):
            pass
        return results

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[TextEvent]:
        """One prompt's output as it comes. The stream's result is `last_result` afterwards."""
        (request_id,) = self._submit([prompt], sampling)
        result = self._streams[request_id].result
        try:
            yield from self._events([request_id])
        finally:
            self.last_result = result

    def chat(self, messages: list[dict], sampling: SamplingParams | None = None) -> GenerateResult:
        """One answer to a conversation, with the model's chat template."""
        return self.generate([self.chat_prompt(messages)], sampling)[0]

    def chat_prompt(self, messages: list[dict]) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages)
        return self.tokenizer.encode(text, add_special_tokens=False)

    last_result: GenerateResult | None = None

    def encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _submit(self, prompts: Sequence[Prompt], sampling: SamplingParams | None) -> list[str]:
        """Queue all prompts, or none if one is refused."""
        sampling = sampling or SamplingParams()
        ids: list[str] = []
        try:
            for index, prompt in enumerate(prompts):
                request_id = f"request-{next(self._ids)}"
                how = sampling
                if index and sampling.seed is not None:
                    how = evolve(sampling, seed=(sampling.seed + index) % 2**63)
                request = Request(request_id, self.encode(prompt), how)
                self.core.submit(request)
                ids.append(request_id)
                self._streams[request_id] = _Stream(
                    Detokenizer(self.tokenizer, sampling.stop),
                    GenerateResult(request_id, len(request.prompt)),
                    time.perf_counter(),
                )
        except UserError as error:
            for request_id in ids:
                self.core.abort(request_id)
                del self._streams[request_id]
            which = f"prompt {len(ids) + 1} of {len(prompts)}: " if len(prompts) > 1 else ""
            raise UserError(f"{which}{error}") from error
        return ids

    def _events(self, ids: Sequence[str]) -> Iterator[TextEvent]:
        """These requests' events until all are finished. Steps serve all requests: others' events wait, unread."""
        streams = {i: self._streams[i] for i in ids}
        try:
            while streams:
                if not any(stream.unread for stream in streams.values()):
                    for token in self.core.step():
                        self._streams[token.request_id].unread.append(self._text(token))
                for request_id, stream in list(streams.items()):
                    events, stream.unread = stream.unread, []
                    if events and events[-1].finish_reason:
                        del streams[request_id]
                    yield from events
        finally:
            for request_id in ids:
                self.core.abort(request_id)
                del self._streams[request_id]

    def _text(self, event: TokenEvent) -> TextEvent:
        stream = self._streams[event.request_id]
        result = stream.result
        at = time.perf_counter()
        if event.index == 0:
            stream.first = at
            result.ttft = at - stream.began
        else:
            result.tpot = (at - stream.first) / event.index
        result.token_ids.append(event.token)
        if event.logprob is not None:
            result.logprobs.append(event.logprob)
            result.top_logprobs.append(event.top)
        reason = event.finish_reason
        text = stream.detokenizer.push(event.token)
        if stream.detokenizer.stopped is not None and reason is None:
            self.core.abort(event.request_id)
            reason = "stop"
        if reason is not None:
            text += stream.detokenizer.finish()
            if stream.detokenizer.stopped is not None:
                reason = "stop"
        result.text += text
        result.finish_reason = reason
        return TextEvent(event.request_id, text, event.token, reason, event.logprob, event.top)
