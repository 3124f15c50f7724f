"""An engine that speaks OpenAI's API, at an address, as a `BaseInferenceEngine`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, ClassVar

import numpy as np
from attrs import define, field, fields
from prometheus_client.parser import text_string_to_metric_families
from pydantic_core import from_json

from sagellm.batch import SamplingParams
from sagellm.control_plane.endpoint import Endpoint, EngineLost, HttpEndpoint, Reply, events
from sagellm.control_plane.features import OPENAI
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
from sagellm.errors import QueueFull, UserError
from sagellm.schemas import KVCacheSchema, QuantizationProfile
from sagellm.target import CapabilityDescriptor

PROBE_SECONDS = 3.0
START_SECONDS = 600.0
OURS = "sagellm"
"""How our server names its kind, in /info."""
DEFAULTS = SamplingParams()
SAMPLING = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "ignore_eos", "min_tokens", "n",
)  # fmt: skip
"""Fields of `SamplingParams` that requests have by the same name."""


class RemoteEngine(BaseInferenceEngine):
    """Whoever answers there goes on when this object ends: it is not ours to stop.

    `start` waits until it is ready and asks what it serves; before that only `health` can be asked.
    """

    KIND: ClassVar[str] = "llm"
    METRICS: Mapping[str, tuple[str, ...]] = {}
    """Field of `EngineLoad` -> names in the engine's /metrics, the first that is there counts; several series are
    added up, and of `kv_use` their mean is taken."""
    FEATURES: frozenset[str] = OPENAI
    """Of requests, see `features.py`, that it can serve."""

    def __init__(
        self,
        endpoint: Endpoint | str,
        model_id: str | None = None,
        *,
        engine_id: str = "remote",
        api_key: str | None = None,
    ):
        """`endpoint` may be an address, http://host:port. Without `model_id` it is the first that is served there."""
        self.endpoint = HttpEndpoint(endpoint, api_key) if isinstance(endpoint, str) else endpoint
        self.engine_id, self.model_id = engine_id, model_id or ""
        self.kind = self.KIND
        """`KIND`, unless the server says that it is one of ours."""
        self._state = EngineState.STARTING
        self._load = EngineLoad()
        self._capability: CapabilityDescriptor | None = None
        self._kv_schema: KVCacheSchema | None = None
        self._calls: dict[str, _Call] = {}
        self._ids = count()

    # its life

    @property
    def state(self) -> EngineState:
        return self._state

    async def start(self) -> None:
        limit = time.monotonic() + START_SECONDS
        while not (health := await self.health()).ready:
            if time.monotonic() > limit:
                raise UserError(f"{self.engine_id} is not ready after {START_SECONDS:.0f} s: {health.detail}")
            await asyncio.sleep(0.2)
        await self.discover()

    async def stop(self, drain_s: float = 30) -> None:
        self._state = EngineState.DRAINING
        open_calls = list(self._calls.values())
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(call.over.wait() for call in open_calls)), drain_s)
        for call in open_calls:
            await self.abort(call.name)
        await self.endpoint.aclose()
        self._state = EngineState.STOPPED

    async def health(self) -> Health:
        if self._state is EngineState.STOPPED:
            return Health(self._state, "it was stopped")
        try:
            reply = await self.endpoint.send("GET", "/health", timeout=PROBE_SECONDS)
            body = await asyncio.wait_for(reply.read(), PROBE_SECONDS)
        except (EngineLost, TimeoutError) as error:
            return Health(EngineState.ERROR, str(error) or "no answer in time")
        if reply.status == 200:
            self._state = EngineState.READY
            return Health(self._state)
        starting = self._state is EngineState.STARTING
        state = EngineState.STARTING if starting else EngineState.DRAINING
        return Health(state if reply.status == 503 else EngineState.ERROR, message_of(reply.status, body))

    # what it is

    async def discover(self) -> None:
        """Ask which model it serves, and, where it tells, what it can do. Raises EngineLost or UserError."""
        listed = await self._get("/v1/models")
        served = {model["id"]: model for model in (listed or {}).get("data", [])}
        if not served:
            raise UserError(f"{self.engine_id} serves no model")
        if self.model_id and self.model_id not in served:
            raise UserError(f"{self.engine_id} does not serve {self.model_id!r}; it has: {', '.join(served)}")
        self.model_id = self.model_id or next(iter(served))
        info = await self._get("/info") or {}
        if info.get("engine_kind") == OURS and self.kind == RemoteEngine.KIND:
            from sagellm.control_plane.adapters.sagellm import SageLLMAdapter

            self.kind, self.FEATURES, self.METRICS = OURS, SageLLMAdapter.FEATURES, SageLLMAdapter.METRICS
        if "capability" in info:
            self._capability = CapabilityDescriptor.from_dict(info["capability"])
            self._kv_schema = KVCacheSchema.from_dict(info["kv_schema"])
            return
        self._capability = CapabilityDescriptor(
            backend=self.KIND,
            device="unknown",
            dtypes=(),
            kernels=frozenset(),
            kv_dtypes=(),
            block_sizes=(),
            max_sequence_length=served[self.model_id].get("max_model_len"),
            notes=("What is empty, the server does not tell.",),
        )

    async def _get(self, path: str) -> Any:
        """None where there is no such route."""
        reply = await self.endpoint.send("GET", path, timeout=PROBE_SECONDS)
        if reply.status in (404, 405):
            await reply.aclose()
            return None
        if reply.status != 200:
            raise as_error(reply.status, await reply.read())
        return await reply.json()

    def get_capability(self) -> CapabilityDescriptor:
        if self._capability is None:
            raise UserError(f"{self.engine_id} was not started; accepted: start() first")
        return self._capability

    def get_kv_schema(self) -> KVCacheSchema:
        if self._kv_schema is None:
            raise UserError(f"{self.engine_id} ({self.KIND}) does not tell how its KV cache is stored")
        return self._kv_schema

    def stats(self) -> EngineLoad:
        """As of the last `refresh`."""
        return self._load

    async def refresh(self, timeout: float = PROBE_SECONDS) -> EngineLoad:
        """Read its /metrics, within so many seconds. Raises EngineLost."""
        reply = await self.endpoint.send("GET", "/metrics", timeout=timeout)
        text = (await reply.read()).decode(errors="replace")
        if reply.status == 200:
            self._load = read_load(text, self.METRICS)
        return self._load

    def load_quant_profile(self, profile: QuantizationProfile) -> None:
        if profile.method != "none":
            raise UserError(
                f"quantization method {profile.method!r} for a server that runs; accepted: none, "
                "or a server that is started with it"
            )

    # requests

    def generate(self, work: Any, sampling: SamplingParams | None = None) -> Any:
        if not isinstance(work, GenerateRequest):
            raise UserError("a server takes one GenerateRequest at a time, to await")
        return self._generate(work)

    async def _generate(self, work: GenerateRequest) -> GenerateResult:
        if work.pooling:
            raise UserError("pooling in generate(); accepted: embed()")
        return await self._answer("/v1/completions", self._request(work), self._id(work), _text)

    async def stream(self, work: Any, sampling: SamplingParams | None = None) -> AsyncIterator[TokenEvent]:  # pyright: ignore
        if not isinstance(work, GenerateRequest):
            work = GenerateRequest(prompt=work, sampling=sampling or DEFAULTS)
        seen = dict.fromkeys(range(work.sampling.n), len(work.resume))
        with self._call(self._id(work)) as call:
            try:
                reply = await call.send(
                    self.endpoint, "/v1/completions", self._request(work) | {"stream": True}
                )
                async for data in events(reply):
                    chunk = from_json(data)
                    if "error" in chunk:
                        raise as_error(500, data)
                    for choice in chunk["choices"]:
                        sample, ids = choice["index"], tuple(choice.get("token_ids") or ())
                        reason = choice["finish_reason"]
                        yield TokenEvent(call.name, seen[sample], ids, choice["text"], (), reason, sample)
                        seen[sample] += len(ids)
                        if reason is not None:
                            del seen[sample]
            except (EngineLost, asyncio.CancelledError):
                if not call.aborted:
                    raise
                for sample, index in seen.items():
                    yield TokenEvent(call.name, index, (), "", (), "abort", sample)
            finally:
                await call.end()

    async def chat(self, messages: Sequence[dict], sampling: SamplingParams | None = None) -> GenerateResult:
        how = self._body(sampling or DEFAULTS)
        if (top := how.pop("logprobs", None)) is not None:
            how |= {"logprobs": True, "top_logprobs": top}
        body = how | {"model": self.model_id, "messages": list(messages)}
        return await self._answer("/v1/chat/completions", body, self._id(None), _content)

    async def embed(
        self, texts: Sequence[Prompt], pooling: str = "mean", normalize: bool = True
    ) -> np.ndarray:
        body: dict[str, Any] = {"model": self.model_id, "input": [_plain(text) for text in texts]}
        if (pooling, normalize) != ("mean", True):
            body |= {"pooling": pooling, "normalize": normalize}
        with self._call(self._id(None)) as call:
            try:
                answer = await (await call.send(self.endpoint, "/v1/embeddings", body)).json()
            finally:
                await call.end()
        ordered = sorted(answer["data"], key=lambda item: item["index"])
        return np.array([item["embedding"] for item in ordered], np.float32)

    async def abort(self, request_id: str) -> bool:
        call = self._calls.get(request_id)
        if call is None:
            return False
        call.aborted = True
        await call.end()
        return True

    async def prefill(self, request: GenerateRequest) -> KVHandle:
        raise UserError(
            f"{self.engine_id} does not give its KV blocks away over HTTP; accepted: an engine here"
        )

    def decode(self, request: GenerateRequest, handle: KVHandle) -> AsyncIterator[TokenEvent]:
        raise UserError(f"{self.engine_id} takes no KV blocks over HTTP; accepted: an engine here")

    def _id(self, work: GenerateRequest | None) -> str:
        return (work and work.id) or f"{self.engine_id}-{next(self._ids)}"

    def _request(self, work: GenerateRequest) -> dict[str, Any]:
        body = self._body(work.sampling) | {"model": self.model_id, "prompt": _plain(work.prompt)}
        if work.resume:
            body["resume_token_ids"] = list(work.resume)
        if work.priority:
            body["priority"] = work.priority
        if work.salt:
            body["cache_salt"] = work.salt
        if "return_token_ids" in self.FEATURES:
            body["return_token_ids"] = True
        return body

    def _body(self, how: SamplingParams) -> dict[str, Any]:
        """Only what differs from what everyone takes for granted, so that servers need not know all of it."""
        given: dict[str, Any] = {
            name: value for name in SAMPLING if (value := getattr(how, name)) != getattr(DEFAULTS, name)
        }
        given |= {"max_tokens": how.max_tokens, "temperature": how.temperature}
        if how.stop:
            given["stop"] = list(how.stop)
        if how.stop_token_ids:
            given["stop_token_ids"] = list(how.stop_token_ids)
        if how.logit_bias:
            given["logit_bias"] = {str(token): bias for token, bias in how.logit_bias}
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(how, name)) is not None:
                given[name] = value
        if how.grammar is not None:
            kinds = {"lark": "grammar", "gbnf": "grammar"}
            text: Any = how.grammar.text
            if how.grammar.kind == "choice":
                text = json.loads(text)
            given["structured_outputs"] = {kinds.get(how.grammar.kind, how.grammar.kind): text}
        return given

    async def _answer(
        self, path: str, body: dict[str, Any], name: str, text: Callable[[dict], str]
    ) -> GenerateResult:
        """How long it took is all that is known of when tokens came, so it stands for the first token."""
        began = time.perf_counter()
        with self._call(name) as call:
            try:
                answer = await (await call.send(self.endpoint, path, body)).json()
            except (EngineLost, asyncio.CancelledError):
                if not call.aborted:
                    raise
                outputs = [Output(finish_reason="abort") for _ in range(body.get("n", 1))]
                return GenerateResult(name, 0, outputs)
            finally:
                await call.end()
        usage = answer.get("usage") or {}
        outputs = [
            Output(
                text(choice),
                list(choice.get("token_ids") or ()),
                choice["finish_reason"],
                choice.get("stop_reason"),
            )
            for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
        ]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        ttft = time.perf_counter() - began
        return GenerateResult(name, usage.get("prompt_tokens", 0), outputs, cached_tokens=cached, ttft=ttft)

    @contextmanager
    def _call(self, name: str) -> Iterator[_Call]:
        if self._state in (EngineState.DRAINING, EngineState.STOPPED):
            raise UserError(f"{self.engine_id} was stopped; accepted: requests before that")
        if name in self._calls:
            raise UserError(f"request id {name!r} is in use; accepted: a new one")
        self._calls[name] = call = _Call(name)
        try:
            yield call
        finally:
            del self._calls[name]
            call.over.set()


@define(eq=False)
class _Call:
    """One request under way, which may be ended from elsewhere."""

    name: str
    aborted: bool = False
    over: asyncio.Event = field(factory=asyncio.Event)
    _sending: asyncio.Task[Reply] | None = None
    _reply: Reply | None = None

    async def send(self, endpoint: Endpoint, path: str, body: dict[str, Any]) -> Reply:
        """Raises what the engine refuses or fails with; CancelledError where it was ended meanwhile."""
        self._sending = asyncio.create_task(endpoint.send("POST", path, body, {"X-Request-ID": self.name}))
        try:
            self._reply = await self._sending
        finally:
            self._sending.cancel()
        if self._reply.status != 200:
            raise as_error(self._reply.status, await self._reply.read())
        return self._reply

    async def end(self) -> None:
        if self._reply is not None:
            await self._reply.aclose()
        elif self._sending is not None:
            self._sending.cancel()


def _text(choice: Mapping[str, Any]) -> str:
    return choice["text"]


def _content(choice: Mapping[str, Any]) -> str:
    return choice["message"]["content"] or ""


def _plain(prompt: Prompt) -> str | list[int]:
    return prompt if isinstance(prompt, str) else list(prompt)


def message_of(status: int, body: bytes) -> str:
    """What an answer other than 200 says, in one line."""
    try:
        given = from_json(body)
        error = given.get("error", given)
        text = error if isinstance(error, str) else error.get("message") or error.get("detail") or given
    except (ValueError, AttributeError):
        text = body.decode(errors="replace")
    return " ".join(f"{status}: {text}".split())[:500]


def as_error(status: int, body: bytes) -> Exception:
    """A refusal is the caller's, a failure the engine's."""
    if status == 429:
        return QueueFull(message_of(status, body))
    return (UserError if 400 <= status < 500 else EngineLost)(message_of(status, body))


def read_load(text: str, names: Mapping[str, Iterable[str]]) -> EngineLoad:
    """From Prometheus' text form."""
    wanted = {name for some in names.values() for name in some}
    lines = [line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] in wanted]
    sums: dict[str, float] = {}
    series: dict[str, int] = {}
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
            series[sample.name] = series.get(sample.name, 0) + 1
    found: dict[str, Any] = {}
    for what, some in names.items():
        for name in some:
            if name in sums:
                found[what] = sums[name] / series[name] if what == "kv_use" else int(sums[name])
                break
    assert found.keys() <= {known.name for known in fields(EngineLoad)}
    return EngineLoad(**found)
