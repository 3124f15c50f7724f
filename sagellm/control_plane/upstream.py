"""An engine as the object that SAGE's `isagellm-control-plane` takes in place of an address.

    manager.register_engine("one", model_id, llm_engine=ProtocolEngine(engine))

Requests and answers are those of `sagellm_protocol` 0.5, a package of SAGE's, which is imported when they come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sagellm.batch import SamplingParams
from sagellm.control_plane.endpoint import EngineLost
from sagellm.engine.base import BaseInferenceEngine, GenerateRequest, GenerateResult, Output, Prompt
from sagellm.engine.engine import SageLLMEngine
from sagellm.engine.stats import EngineStats
from sagellm.errors import QueueFull, UserError, unknown

STRATEGIES = ("greedy", "sampling", "speculative")
"""The last is sampling too: guesses are the engine's matter, and change no output."""
PLACED = (
    "kv_budget_tokens",
    "phase",
    "rank",
    "world_size",
    "group_id",
    "tp_rank",
    "pp_rank",
    "tp_size",
    "pp_size",
)
"""Fields of a request that is a part of one, or that says how the engine is built."""


class ProtocolEngine:
    """`execute` and `stream` raise nothing: what is refused or fails is an answer whose `error` says it.

    A request's `model` is not looked at, as the control plane may call the model as it likes.
    """

    def __init__(self, engine: BaseInferenceEngine):
        self.engine = engine

    @property
    def engine_id(self) -> str:
        return self.engine.engine_id

    async def start(self) -> None:
        await self.engine.start()

    async def stop(self) -> None:
        await self.engine.stop()

    async def health_check(self) -> bool:
        return (await self.engine.health()).ready

    async def execute(self, request: Any) -> Any:
        """`Request` to `Response`."""
        from sagellm_protocol import Response

        began = time.perf_counter()
        names = {"request_id": request.request_id, "trace_id": request.trace_id}
        try:
            work = self._work(request)
            if isinstance(work, GenerateRequest):
                result = await self.engine.generate(work)  # type: ignore[misc]
            else:
                result = await self.engine.chat(work, sampling_of(request))
            ended = await self._end(result, time.perf_counter() - began)
        except Exception as error:
            ended = _failure(error)
        return Response(output_text=ended.pop("content"), **names, **ended)

    async def stream(self, request: Any) -> AsyncIterator[Any]:
        """`StreamEventStart`, a `StreamEventDelta` for each piece, `StreamEventEnd`.

        A conversation is one piece where the engine is another project's: the interface has no stream of it.
        """
        from sagellm_protocol import StreamEventDelta, StreamEventEnd, StreamEventStart

        began = time.perf_counter()
        names = {"request_id": request.request_id, "trace_id": request.trace_id, "engine_id": self.engine_id}
        try:
            work = self._work(request)
            known = (
                len(work.prompt)
                if isinstance(work, GenerateRequest) and not isinstance(work.prompt, str)
                else None
            )
        except Exception as error:
            yield StreamEventStart(**names)
            yield StreamEventEnd(**names, **_failure(error))
            return
        yield StreamEventStart(**names, prompt_tokens=known)
        over = False
        try:
            if isinstance(work, GenerateRequest):
                told = self.engine.stream(work)
                first, output = 0.0, Output()
                async for event in told:
                    first = first or time.perf_counter() - began
                    output.text += event.text
                    output.token_ids += event.ids
                    output.finish_reason = event.finish_reason
                    if event.text or event.ids:
                        yield StreamEventDelta(**names, content=event.text, content_tokens=list(event.ids))
                result = getattr(told, "result", None)
                if result is None:
                    pieces = max(1, len(output.token_ids) - 1)
                    tpot = (time.perf_counter() - began - first) / pieces
                    result = GenerateResult(request.request_id, known or 0, [output], ttft=first, tpot=tpot)
            else:
                result = await self.engine.chat(work, sampling_of(request))
                yield StreamEventDelta(**names, content=result.text, content_tokens=list(result.token_ids))
            over = True
            ended = await self._end(result, time.perf_counter() - began)
        except Exception as error:
            ended = _failure(error)
        finally:
            if not over:
                await self.engine.abort(request.request_id)
        yield StreamEventEnd(**names, **ended)

    async def encode(self, texts: Sequence[str]) -> list[list[float]]:
        """A vector of length 1 for each text: with this it is their `EmbeddingEngine` too."""
        return (await self.engine.embed(list(texts))).tolist()

    def _work(self, request: Any) -> GenerateRequest | list[dict[str, Any]]:
        """Ours is given token ids, so that a conversation is a prompt like any other; others their messages."""
        given = [name for name in PLACED if getattr(request, name) is not None]
        if given:
            raise UserError(
                f"{given[0]} is {getattr(request, given[0])!r}; accepted: None, the request is a whole one"
            )
        prompt: Prompt = request.prompt
        if request.messages:
            messages = [message.model_dump(exclude_none=True) for message in request.messages]
            if not isinstance(self.engine, SageLLMEngine):
                return messages
            prompt = self.engine.chat_prompt(messages)
        elif not prompt:
            raise UserError("prompt and messages are empty; accepted: one of them")
        elif isinstance(self.engine, SageLLMEngine):
            prompt = self.engine.encode(prompt)
        return GenerateRequest(prompt=prompt, sampling=sampling_of(request), id=request.request_id)

    async def _end(self, result: GenerateResult, seconds: float) -> dict[str, Any]:
        """What the last event says; a `Response` says it too."""
        from sagellm_protocol import Metrics

        output = result.outputs[0]
        if output.finish_reason not in ("stop", "length"):
            raise EngineLost(result.error or f"the request ended with {output.finish_reason}")
        made, tpot = len(output.token_ids), result.tpot * 1e3
        figures: dict[str, Any] = {
            "ttft_ms": result.ttft * 1e3,
            "tbt_ms": tpot,
            "tpot_ms": tpot,
            "throughput_tps": made / seconds,
            "peak_mem_mb": 0,
            "error_rate": 0.0,
            "prefix_hit_rate": result.cached_tokens / result.prompt_tokens if result.prompt_tokens else 0.0,
            "prefill_ms": max(0.0, result.ttft - result.queued) * 1e3,
            "decode_ms": tpot * max(0, made - 1),
        }
        # the core may be within a step, in a process of its own
        load = await asyncio.to_thread(self.engine.stats)
        if isinstance(load, EngineStats):
            schema = self.engine.get_kv_schema()
            figures["kv_used_tokens"] = load.kv_blocks_used * schema.block_size
            figures["kv_used_bytes"] = int(load.kv_blocks_used * schema.bytes_per_block)
        return {
            "content": output.text,
            "output_tokens": list(output.token_ids),
            "prompt_tokens": result.prompt_tokens or None,
            "finish_reason": output.finish_reason,
            "metrics": Metrics(**figures),
        }


def sampling_of(request: Any) -> SamplingParams:
    """A request's own temperature and top_p go before those of its `sampling_params`. Raises UserError."""
    how = request.sampling_params
    given: dict[str, Any] = {"max_tokens": request.max_tokens, "temperature": 1.0}
    if how is not None:
        if how.strategy.value not in STRATEGIES:
            raise unknown("strategy", how.strategy.value, STRATEGIES)
        if not how.skip_special_tokens:
            raise UserError("skip_special_tokens is False; accepted: True")
        given |= {
            "max_tokens": min(request.max_tokens, how.max_tokens or request.max_tokens),
            "temperature": 0.0 if how.strategy.value == "greedy" else how.temperature,
            "top_p": how.top_p,
            "top_k": max(0, how.top_k),
            "repetition_penalty": how.repetition_penalty,
            "presence_penalty": how.presence_penalty,
            "frequency_penalty": how.frequency_penalty,
            "stop": tuple(how.stop_sequences or ()),
            "seed": how.seed,
        }
    given |= {
        name: value for name in ("temperature", "top_p") if (value := getattr(request, name)) is not None
    }
    return SamplingParams(**given)


def _failure(error: Exception) -> dict[str, Any]:
    """The same, of a request that was refused or failed; only where trying again can help it says so."""
    from sagellm_protocol import Error, ErrorCode, Metrics

    refused = isinstance(error, UserError) and not isinstance(error, QueueFull)
    code = ErrorCode.UNAVAILABLE
    if isinstance(error, UserError):
        code = ErrorCode.INVALID_ARGUMENT if refused else ErrorCode.RESOURCE_EXHAUSTED
    return {
        "content": "",
        "output_tokens": [],
        "finish_reason": "error",
        "metrics": Metrics(ttft_ms=0, throughput_tps=0, peak_mem_mb=0, error_rate=1),
        "error": Error(code=code, message=str(error) or type(error).__name__, retryable=not refused),
    }
