"""The one engine interface: what a control plane, a server or a script may ask of an engine, and the values it gets."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from attrs import define, field, frozen

from sagellm.batch import SamplingParams
from sagellm.engine.events import Top
from sagellm.engine.stats import EngineLoad
from sagellm.errors import UserError
from sagellm.schemas import KVCacheSchema, QuantizationProfile
from sagellm.target import CapabilityDescriptor

Prompt = str | Sequence[int]


class EngineState(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    """Finishes what it has and takes nothing new."""
    STOPPED = "stopped"
    ERROR = "error"
    """The core cannot be started again."""


@frozen
class Health:
    """Whether requests can be sent, and why not."""

    state: EngineState
    detail: str = ""

    @property
    def ready(self) -> bool:
        return self.state is EngineState.READY


@frozen(kw_only=True)
class GenerateRequest:
    """A prompt, and how it is to be continued."""

    prompt: Prompt
    """Text, or token ids."""
    sampling: SamplingParams = field(factory=SamplingParams)
    id: str | None = None
    """None takes one that is free."""
    priority: int = 0
    """Lower goes first, where the engine's order is `priority`."""
    deadline: float = math.inf
    """Seconds within which the first token is wanted, where the engine's order is `deadline`."""
    salt: str = ""
    """Cached blocks are shared among requests of one salt only."""
    pooling: str = ""
    """`mean`, `last` or `cls`: the prompt's vector is wanted, `GenerateResult.embedding`, and no output."""
    resume: tuple[int, ...] = field(default=(), converter=tuple)
    """Tokens of the output that were chosen before, elsewhere: it goes on behind them, and no event tells them again.
    If it ends with them it ends at once, for the reason that it had. Their logprobs are not known."""

    @resume.validator
    def _check_resume(self, attribute: object, value: tuple[int, ...]) -> None:
        for token in value:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise UserError(f"resume has {token!r}; accepted: token ids")
        if not value:
            return
        how = self.sampling
        if how.n > 1 or how.prompt_logprobs is not None or self.pooling:
            given = f"n {how.n}" if how.n > 1 else "pooling" if self.pooling else "prompt_logprobs"
            raise UserError(
                f"resume is given with {given}; accepted: with one output, and neither pooling nor "
                "prompt_logprobs"
            )
        if len(value) > how.max_tokens:
            raise UserError(
                f"resume has {len(value)} tokens; accepted: at most max_tokens, which is {how.max_tokens}"
            )


@frozen
class TokenEvent:
    """A piece of one output."""

    request_id: str
    index: int
    """How many tokens of this output came before."""
    ids: tuple[int, ...]
    text: str
    """Text that is complete now; may be empty."""
    logprobs: tuple[tuple[float, Top], ...] = ()
    """Of each token, where they were asked for: its logprob, and the likeliest tokens with theirs."""
    finish_reason: str | None = None
    """`stop` (an end token or stop string), `length`, `abort`, `error`, or None while it goes on."""
    sample: int = 0


@define
class Output:
    """One of a request's outputs."""

    text: str = ""
    token_ids: list[int] = field(factory=list)
    finish_reason: str | None = None
    """As in `TokenEvent`."""
    stopped_by: str | None = None
    """The stop string that was met."""
    logprobs: list[float] = field(factory=list)
    top_logprobs: list[Top] = field(factory=list)


@define
class GenerateResult:
    """A finished request."""

    request_id: str
    prompt_tokens: int
    outputs: list[Output] = field(factory=list)
    """As many as `SamplingParams.n`."""
    prompt_logprobs: list[tuple[float, Top] | None] | None = None
    """Of each token of the prompt, where asked for; the first has none."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were in the cache."""
    cache_miss: str = ""
    """Why the first block that was not in the cache was not."""
    queued: float = 0.0
    """Seconds until its first turn."""
    ttft: float = 0.0
    """Seconds from submission to the first token."""
    tpot: float = 0.0
    """Mean seconds per token after the first, of the first output."""
    error: str = ""
    """Why it failed."""
    embedding: np.ndarray | None = None
    """float32 [hidden], where it was asked for: the hidden states behind the last norm, pooled."""

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[float]:
        return self.outputs[0].logprobs

    @property
    def top_logprobs(self) -> list[Top]:
        return self.outputs[0].top_logprobs


@frozen(kw_only=True)
class KVHandle:
    """A prompt's keys and values outside of any engine: another one of the same model and schema can decode from it."""

    model_id: str
    schema: KVCacheSchema
    tokens: list[int]
    """Tokens of the full blocks; what follows is computed again, less than one block."""
    values: np.ndarray
    """uint8, the bytes of [blocks, layers, 2, block_size, heads, head_dim] in the schema's dtype."""

    def save(self, path: str | Path) -> None:
        """Write it as a safetensors file."""
        from safetensors.numpy import save_file

        meta = {"model_id": self.model_id, "schema": self.schema.to_json()}
        save_file({"tokens": np.array(self.tokens, np.int64), "values": self.values}, str(path), meta)

    @classmethod
    def load(cls, path: str | Path) -> KVHandle:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "np") as file:
                meta = file.metadata() or {}
                return cls(
                    model_id=meta["model_id"],
                    schema=KVCacheSchema.from_json(meta["schema"]),
                    tokens=file.get_tensor("tokens").tolist(),
                    values=file.get_tensor("values"),
                )
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{str(path)!r} is no KV handle: {error}") from error


class BaseInferenceEngine(ABC):
    """An engine that serves one model. Any method raises UserError for bad input."""

    engine_id: str
    model_id: str

    @property
    @abstractmethod
    def state(self) -> EngineState: ...

    @abstractmethod
    async def start(self) -> None:
        """Be ready for requests; does nothing where it is. Until then the state is STARTING, and a control plane that
        is given the engine calls this."""

    @abstractmethod
    async def stop(self, drain_s: float = 30) -> None:
        """Take nothing new, finish what there is within so many seconds, abort the rest, and end."""

    @abstractmethod
    async def health(self) -> Health: ...

    @abstractmethod
    def get_capability(self) -> CapabilityDescriptor: ...

    @abstractmethod
    def get_kv_schema(self) -> KVCacheSchema: ...

    @abstractmethod
    def stats(self) -> EngineLoad:
        """How busy it is; an engine of ours tells all of `EngineStats`."""

    @abstractmethod
    def load_quant_profile(self, profile: QuantizationProfile) -> None:
        """Serve the model as this profile says; refused where the backend cannot."""

    @abstractmethod
    def generate(self, work: Any, sampling: SamplingParams | None = None) -> Awaitable[GenerateResult] | list:
        """`await engine.generate(request)` gives its result."""

    @abstractmethod
    def stream(self, work: Any, sampling: SamplingParams | None = None) -> AsyncIterator[TokenEvent]:
        """A request's output as it comes."""

    @abstractmethod
    async def chat(self, messages: Sequence[dict], sampling: SamplingParams | None = None) -> GenerateResult:
        """One answer to a conversation, with the model's chat template."""

    def chat_prompt(self, messages: Sequence[dict]) -> Sequence[int] | None:
        """Token ids that `chat` makes of a conversation: `stream` of them says what `chat` says, piece by piece.

        None, as here: the engine does not tell, and its chats come in one piece.
        """
        return None

    @abstractmethod
    async def embed(
        self, texts: Sequence[Prompt], pooling: str = "mean", normalize: bool = True
    ) -> np.ndarray:
        """[texts, hidden] float32: hidden states pooled as `mean`, `last` or `cls`, by default to the length 1."""

    @abstractmethod
    async def abort(self, request_id: str) -> bool:
        """End a request wherever it is; False if there is none of this id."""

    @abstractmethod
    async def prefill(self, request: GenerateRequest) -> KVHandle:
        """Compute a prompt's keys and values, to be decoded from elsewhere."""

    @abstractmethod
    def decode(self, request: GenerateRequest, handle: KVHandle) -> AsyncIterator[TokenEvent]:
        """As `stream`, with keys and values from the handle."""
