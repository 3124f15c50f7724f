"""Engine streams under an HTTP request: read to the end or piece by piece, and ended when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import Any

from fastapi import Request
from pydantic_core import to_json
from starlette.responses import StreamingResponse

from sagellm.engine.base import GenerateRequest, GenerateResult, TokenEvent
from sagellm.engine.engine import SageLLMEngine, Stream
from sagellm.engine.grammars import FAILED
from sagellm.server.errors import APIError, body_of

DONE = b"data: [DONE]\n\n"
GONE = 499
"""Nobody is there to see this status; proxies log it."""


def usage_of(results: Iterable[GenerateResult]) -> dict[str, Any]:
    results = list(results)
    prompt = sum(result.prompt_tokens for result in results)
    made = sum(len(output.token_ids) for result in results for output in result.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(result.cached_tokens for result in results)},
    }


def finish_reason(reason: str | None) -> str | None:
    """As the OpenAI API names it: it knows no `abort` and no `error`."""
    return "stop" if reason == "abort" else reason


def open_streams(engine: SageLLMEngine, requests: Sequence[GenerateRequest]) -> list[Stream]:
    """All or none."""
    streams: list[Stream] = []
    try:
        for request in requests:
            streams.append(engine.stream(request))
    except BaseException:
        close(streams)
        raise
    return streams


def close(streams: Iterable[Stream]) -> None:
    for stream in streams:
        stream.close()


async def to_the_end(request: Request, streams: Sequence[Stream]) -> list[GenerateResult]:
    """Wait for all; a client that goes away ends them."""
    try:
        await unless_gone(request, _read_all(streams))
    finally:
        close(streams)
    results = [stream.result for stream in streams]
    for result in results:
        if result.error:
            raise failed(result)
    return results


def failed(result: GenerateResult) -> APIError:
    if FAILED in result.error:
        return APIError(400, result.error, code="grammar_failed")
    return APIError(500, "the request failed in the engine", code="engine_error")


async def _read_all(streams: Sequence[Stream]) -> None:
    async def read(stream: Stream) -> None:
        async for _ in stream:
            pass

    await asyncio.gather(*map(read, streams))


async def unless_gone(request: Request, work: Coroutine) -> Any:
    """What the work comes to; a client that goes away ends it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise APIError(GONE, "the client went away")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


Pieces = Callable[[int, TokenEvent], Iterable[dict[str, Any]]]
"""(which stream, its event) -> chunks."""


async def as_they_come(
    request: Request,
    streams: Sequence[Stream],
    pieces: Pieces,
    *,
    first: Iterable[dict[str, Any]] = (),
    last: Callable[[list[GenerateResult]], Iterable[dict[str, Any]]] = lambda results: (),
) -> StreamingResponse:
    """Server-sent events. A refusal is raised before the answer begins; a failure later is an event with `error`."""
    events = _merged(streams)
    try:
        head = await anext(events)
    except BaseException:
        close(streams)
        raise

    async def body() -> AsyncIterator[bytes]:
        try:
            for chunk in first:
                yield _sse(chunk)
            for chunk in pieces(*head):
                yield _sse(chunk)
            async for which, event in events:
                for chunk in pieces(which, event):
                    yield _sse(chunk)
            for stream in streams:
                if stream.result.error:
                    error = failed(stream.result)
                    yield _sse(body_of(error.status, error.message, code=error.code))
                    return
            for chunk in last([stream.result for stream in streams]):
                yield _sse(chunk)
            yield DONE
        finally:
            await events.aclose()
            close(streams)

    return StreamingResponse(body(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, TokenEvent]]:
    """Events of all streams as they come, with the stream's number."""
    if len(streams) == 1:
        async for event in streams[0]:
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, TokenEvent | BaseException | None]] = asyncio.Queue(len(streams))

    async def forward(which: int, stream: Stream) -> None:
        try:
            async for event in stream:
                await queue.put((which, event))
            await queue.put((which, None))
        except Exception as error:
            await queue.put((which, error))

    tasks = [asyncio.create_task(forward(*pair)) for pair in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            which, event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                left -= 1
            else:
                yield which, event
    finally:
        for task in tasks:
            task.cancel()


def _sse(chunk: dict[str, Any]) -> bytes:
    return b"data: " + to_json(chunk) + b"\n\n"
