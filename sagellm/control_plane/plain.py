"""OpenAI's API, in its plainest form, over any `BaseInferenceEngine`; what that cannot say is refused by name."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from attrs import fields
from pydantic_core import from_json, to_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sagellm.batch import SamplingParams
from sagellm.control_plane.features import FIELDS, ROUTES, TOKEN_IDS, asks
from sagellm.engine.base import BaseInferenceEngine, GenerateRequest, GenerateResult, TokenEvent
from sagellm.errors import QueueFull, UserError
from sagellm.server.errors import APIError, answer, body_of

SAMPLING = {a.name for a in fields(SamplingParams)} - {"logprobs", "prompt_logprobs", "grammar"}
IGNORED = {"model", "user", "stream_options", "metadata", "store"}
"""They do not change the output."""
FEATURES = frozenset(FIELDS.keys() & SAMPLING) | frozenset(ROUTES.values()) | {TOKEN_IDS}
DONE = b"data: [DONE]\n\n"
Said = Callable[[TokenEvent], dict[str, Any]]
"""What a choice says of an event."""


def plain_app(engine: BaseInferenceEngine) -> Starlette:
    """Routes of an engine as servers have them."""

    async def health(request: Request) -> Response:
        found = await engine.health()
        return (
            JSONResponse({"status": "ok"}) if found.ready else answer(503, found.detail or found.state.value)
        )

    async def models(request: Request) -> Response:
        longest = engine.get_capability().max_sequence_length
        model = {"id": engine.model_id, "object": "model", "owned_by": "engine", "max_model_len": longest}
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(request: Request) -> Response:
        body = await read(request)
        how = _sampling(body, {"prompt", "stream", "priority", "cache_salt"})
        prompt = body.get("prompt")
        if not isinstance(prompt, (str, list)) or not prompt:
            raise UserError(f"prompt is {prompt!r}; accepted: one text, or one list of token ids")
        name = f"cmpl-{uuid.uuid4().hex}"
        work = GenerateRequest(
            prompt=prompt,
            sampling=how,
            id=name,
            priority=body.get("priority") or 0,
            salt=body.get("cache_salt") or "",
        )
        about = {"id": name, "created": int(time.time()), "model": engine.model_id}
        if body.get("stream"):
            return await _stream(engine, work, about | {"object": "text_completion"}, _text)
        result = await engine.generate(work)  # type: ignore[misc]
        choices = [
            {"index": i, "text": o.text, "logprobs": None, "finish_reason": _reason(o.finish_reason)}
            for i, o in enumerate(result.outputs)
        ]
        return JSONResponse(
            about | {"object": "text_completion", "choices": choices, "usage": _usage(result)}
        )

    async def chat(request: Request) -> Response:
        body = await read(request)
        how = _sampling(body, {"messages", "stream"})
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise UserError(f"messages is {messages!r}; accepted: a list of messages")
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": engine.model_id}
        options = body.get("stream_options") or {}
        if body.get("stream") and (prompt := engine.chat_prompt(messages)) is not None:
            work = GenerateRequest(prompt=prompt, sampling=how, id=about["id"])
            head = about | {"object": "chat.completion.chunk"}
            return await _stream(engine, work, head, _delta(), bool(options.get("include_usage")))
        result = await engine.chat(messages, how)
        if body.get("stream"):
            return StreamingResponse(_told_at_once(result, about, options), media_type="text/event-stream")
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": o.text},
                "finish_reason": _reason(o.finish_reason),
            }
            for i, o in enumerate(result.outputs)
        ]
        return JSONResponse(
            about | {"object": "chat.completion", "choices": choices, "usage": _usage(result)}
        )

    async def embeddings(request: Request) -> Response:
        body = await read(request)
        given = body.get("input")
        texts = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        vectors = await engine.embed(texts)
        data = [
            {"object": "embedding", "index": i, "embedding": vector.tolist()}
            for i, vector in enumerate(vectors)
        ]
        return JSONResponse({"object": "list", "data": data, "model": engine.model_id})

    async def read(request: Request) -> dict[str, Any]:
        body = await _body(request)
        if body.get("model") not in (None, engine.model_id):
            raise APIError(404, f"the model {body['model']!r} does not exist; accepted: {engine.model_id!r}")
        return body

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, APIError)
        return answer(error.status, error.message, param="model", code="model_not_found")

    async def refused(request: Request, error: Exception) -> Response:
        return answer(429 if isinstance(error, QueueFull) else 400, str(error))

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/embeddings", embeddings, methods=["POST"]),
        ],
        exception_handlers={UserError: refused, APIError: unknown},
    )


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = from_json(await request.body())
    except ValueError as error:
        raise UserError(f"the body is no valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise UserError("the body is no JSON object; accepted: an object")
    return body


def _sampling(body: Mapping[str, Any], own: set[str]) -> SamplingParams:
    given = {k: v for k, v in body.items() if k not in own | IGNORED and asks(k, v)}
    if (most := given.pop("max_completion_tokens", None)) is not None:
        given["max_tokens"] = most
    if unknown := sorted(set(given) - SAMPLING):
        raise UserError(
            f"{unknown[0]} is not supported by this engine; accepted: {', '.join(sorted(SAMPLING))}"
        )
    return SamplingParams(**{"temperature": 1.0} | given)


def _usage(result: GenerateResult) -> dict[str, Any]:
    made = sum(len(output.token_ids) for output in result.outputs)
    details = {"cached_tokens": result.cached_tokens}
    return _counts(result.prompt_tokens, made) | {"prompt_tokens_details": details}


def _counts(prompt: int, made: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _reason(reason: str | None) -> str | None:
    return "stop" if reason == "abort" else reason


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + to_json(chunk) + b"\n\n"


async def _stream(
    engine: BaseInferenceEngine, work: GenerateRequest, head: dict, said: Said, usage: bool = False
) -> StreamingResponse:
    """The first event is waited for, so that what the engine refuses has a status of its own."""
    events = aiter(engine.stream(work))
    first = await anext(events, None)

    async def pieces() -> AsyncIterator[bytes]:
        event, made = first, 0
        try:
            while event is not None:
                made += len(event.ids)
                choice = {"index": event.sample, "finish_reason": _reason(event.finish_reason)}
                yield _event(head | {"choices": [choice | said(event)]})
                event = await anext(events, None)
        except UserError as error:
            yield _event(body_of(400, str(error)))
            return
        if usage:
            yield _event(head | {"choices": [], "usage": _counts(len(work.prompt), made)})
        yield DONE

    return StreamingResponse(pieces(), media_type="text/event-stream")


def _text(event: TokenEvent) -> dict[str, Any]:
    return {"text": event.text, "logprobs": None}


def _delta() -> Said:
    """Of a chat; the first piece of each answer says whose it is."""
    begun: set[int] = set()

    def said(event: TokenEvent) -> dict[str, Any]:
        role = {} if event.sample in begun else {"role": "assistant"}
        begun.add(event.sample)
        return {"delta": role | {"content": event.text}}

    return said


async def _told_at_once(result: GenerateResult, about: dict, options: Mapping) -> AsyncIterator[bytes]:
    """The engine does not tell what it makes of a conversation, so the whole answer is one piece."""
    head = about | {"object": "chat.completion.chunk"}
    for i, output in enumerate(result.outputs):
        delta = {"role": "assistant", "content": output.text}
        choice = {"index": i, "delta": delta, "finish_reason": _reason(output.finish_reason)}
        yield _event(head | {"choices": [choice]})
    if options.get("include_usage"):
        yield _event(head | {"choices": [], "usage": _usage(result)})
    yield DONE
