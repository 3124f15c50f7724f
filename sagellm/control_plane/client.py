"""`UnifiedInferenceClient`: chat, text and embeddings from a control plane, a server, or an engine in this process."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import weakref
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic_core import from_json

from sagellm.control_plane.endpoint import AppEndpoint, Endpoint, EngineLost, HttpEndpoint, Reply, events
from sagellm.control_plane.remote import as_error, message_of
from sagellm.engine.base import BaseInferenceEngine, Prompt
from sagellm.errors import QueueFull, UserError
from sagellm.ports import SagePorts

if TYPE_CHECKING:
    from sagellm.control_plane.manager import ControlPlaneManager

URL = "SAGELLM_CONTROL_PLANE_URL"
KEY = "SAGELLM_API_KEY"
ATTEMPTS = 4
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
"""Seconds between attempts; each pause is twice the last, and a random part of it is left out."""
RETRIED = frozenset({429, 500, 502, 503, 504})


class InferenceFailed(Exception):
    """No answer could be had; the request may be fine."""


class AsyncInferenceClient:
    """Answers are OpenAI's objects, as dictionaries. Raises UserError for what is refused (QueueFull: for now), and
    InferenceFailed where nobody answers.

    A request is sent up to four times where the answer is 429, 5xx or none, with pauses that grow, or as long as the
    answer's Retry-After; a stream, only until its first piece. `timeout` seconds are for all of this: an answer that
    says to come again later than that is the last.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        default_llm_model: str | None = None,
        default_embedding_model: str | None = None,
        timeout: float = 60,
        manager: ControlPlaneManager | None = None,
    ):
        self._endpoint, self._timeout, self._manager = endpoint, timeout, manager
        self._llm, self._embedding = default_llm_model, default_embedding_model

    @classmethod
    async def create(
        cls,
        control_plane_url: str | None = None,
        default_llm_model: str | None = None,
        default_embedding_model: str | None = None,
        timeout: float = 60,
        *,
        api_key: str | None = None,
        manager: ControlPlaneManager | None = None,
        engine: BaseInferenceEngine | None = None,
    ) -> Self:
        """A client of the control plane at this address, of a manager or of an engine in this process.

        Without any of them: at `SAGELLM_CONTROL_PLANE_URL`, or at the gateway's port of this machine. Models default
        to the only one that is served. Raises InferenceFailed where nobody answers there.
        """
        given = [
            name
            for name, one in (
                ("control_plane_url", control_plane_url),
                ("manager", manager),
                ("engine", engine),
            )
            if one
        ]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are given; accepted: one of them")
        if manager is not None:
            from sagellm.control_plane.app import make_app

            await manager.start()
            endpoint: Endpoint = AppEndpoint(make_app(manager))
        elif engine is not None:
            from sagellm.control_plane.face import endpoint_of

            endpoint = endpoint_of(engine)
        else:
            url = (
                control_plane_url
                or os.environ.get(URL)
                or f"http://127.0.0.1:{SagePorts.load(os.environ).gateway}"
            )
            endpoint = HttpEndpoint(url.removesuffix("/").removesuffix("/v1"), api_key or os.environ.get(KEY))
            try:
                await (await endpoint.send("GET", "/health", timeout=min(timeout, 5))).read()
            except EngineLost as error:
                await endpoint.aclose()
                raise InferenceFailed(
                    f"no control plane answers ({error}); start one with `sagellm gateway`, or give its address"
                ) from error
        return cls(endpoint, default_llm_model, default_embedding_model, timeout, manager)

    async def chat(
        self, messages: Sequence[dict] | str, model: str | None = None, **more: Any
    ) -> dict[str, Any]:
        """The answer to a conversation; `more` are fields of OpenAI's request, as max_tokens."""
        return await self._ask("/v1/chat/completions", await self._chat(messages, model, more))

    async def chat_stream(
        self, messages: Sequence[dict] | str, model: str | None = None, **more: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """The same in chunks, as they come."""
        body = await self._chat(messages, model, more)
        async for chunk in self._stream("/v1/chat/completions", body):
            yield chunk

    async def generate(
        self, prompt: Prompt | Sequence[Prompt], model: str | None = None, **more: Any
    ) -> dict:
        """What follows a prompt."""
        return await self._ask("/v1/completions", await self._text(prompt, model, more))

    async def generate_stream(
        self, prompt: Prompt | Sequence[Prompt], model: str | None = None, **more: Any
    ) -> AsyncIterator[dict[str, Any]]:
        async for chunk in self._stream("/v1/completions", await self._text(prompt, model, more)):
            yield chunk

    async def embed(
        self, texts: str | Sequence[str], model: str | None = None, **more: Any
    ) -> dict[str, Any]:
        """A vector for each text, in `data[].embedding`."""
        name = model or self._embedding or await self._only_model()
        body = {"model": name, "input": texts if isinstance(texts, str) else list(texts)} | more
        return await self._ask("/v1/embeddings", body)

    async def models(self) -> list[dict[str, Any]]:
        return (await self._ask("/v1/models", None))["data"]

    async def _chat(self, messages: Sequence[dict] | str, model: str | None, more: dict) -> dict[str, Any]:
        said = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        return {"model": model or self._llm or await self._only_model(), "messages": said} | more

    async def _text(self, prompt: Any, model: str | None, more: dict) -> dict[str, Any]:
        given = prompt if isinstance(prompt, str) else list(prompt)
        return {"model": model or self._llm or await self._only_model(), "prompt": given} | more

    async def _only_model(self) -> str:
        names = [model["id"] for model in await self.models()]
        if len(names) != 1:
            raise UserError(f"model is missing; accepted: {', '.join(names) or 'none is served'}")
        return names[0]

    async def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        try:
            async with asyncio.timeout(self._timeout):
                reply = await self._begin(path, body)
                return await reply.json()
        except EngineLost as error:
            raise InferenceFailed(str(error)) from error
        except TimeoutError as error:
            raise InferenceFailed(f"no answer within {self._timeout:g} s") from error

    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        try:
            async with asyncio.timeout(self._timeout):
                reply = await self._begin(path, body | {"stream": True})
        except TimeoutError as error:
            raise InferenceFailed(f"no answer within {self._timeout:g} s") from error
        try:
            async for data in events(reply):
                chunk = from_json(data)
                if "error" in chunk:
                    raise InferenceFailed(message_of(reply.status, data))
                yield chunk
        except EngineLost as error:
            raise InferenceFailed(str(error)) from error
        finally:
            await reply.aclose()

    async def _begin(self, path: str, body: dict[str, Any] | None) -> Reply:
        pause, last = FIRST_PAUSE, ""
        now = asyncio.get_running_loop().time
        until = now() + self._timeout
        for turn in range(ATTEMPTS):
            wait = 0.0
            try:
                reply = await self._endpoint.send("GET" if body is None else "POST", path, body)
            except EngineLost as error:
                last = str(error)
            else:
                if reply.status == 200:
                    return reply
                said = await reply.read()
                after = reply.headers.get("retry-after", "")
                wait = float(after) if after.isdecimal() else 0.0
                final = (turn + 1 == ATTEMPTS and reply.status == 429) or now() + wait > until
                if reply.status not in RETRIED or final:
                    raise _raised(as_error(reply.status, said))
                last = message_of(reply.status, said)
            if turn + 1 < ATTEMPTS:
                await asyncio.sleep(max(wait, pause * (0.5 + random.random() / 2)))
                pause = min(LONGEST_PAUSE, 2 * pause)
        raise InferenceFailed(last)

    async def aclose(self) -> None:
        await self._endpoint.aclose()
        if self._manager is not None:
            await self._manager.stop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


def _raised(error: Exception) -> Exception:
    return error if isinstance(error, (UserError, QueueFull)) else InferenceFailed(str(error))


class UnifiedInferenceClient:
    """`AsyncInferenceClient` for programs without an event loop: the same calls, which wait. Any thread may call."""

    def __init__(self, client: AsyncInferenceClient, loop: _Loop):
        self._client, self._loop = client, loop
        self._finalizer = weakref.finalize(self, loop.close, client.aclose)

    @classmethod
    def create(cls, control_plane_url: str | None = None, *defaults: Any, **given: Any) -> Self:
        """As `AsyncInferenceClient.create`."""
        loop = _Loop()
        try:
            return cls(loop.run(AsyncInferenceClient.create(control_plane_url, *defaults, **given)), loop)
        except BaseException:
            loop.close()
            raise

    def chat(self, messages: Sequence[dict] | str, model: str | None = None, **more: Any) -> dict[str, Any]:
        return self._loop.run(self._client.chat(messages, model, **more))

    def chat_stream(
        self, messages: Sequence[dict] | str, model: str | None = None, **more: Any
    ) -> Iterator[dict]:
        return self._loop.each(self._client.chat_stream(messages, model, **more))

    def generate(
        self, prompt: Prompt | Sequence[Prompt], model: str | None = None, **more: Any
    ) -> dict[str, Any]:
        return self._loop.run(self._client.generate(prompt, model, **more))

    def generate_stream(
        self, prompt: Prompt | Sequence[Prompt], model: str | None = None, **more: Any
    ) -> Iterator[dict]:
        return self._loop.each(self._client.generate_stream(prompt, model, **more))

    def embed(self, texts: str | Sequence[str], model: str | None = None, **more: Any) -> dict[str, Any]:
        return self._loop.run(self._client.embed(texts, model, **more))

    def models(self) -> list[dict[str, Any]]:
        return self._loop.run(self._client.models())

    def close(self) -> None:
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sagellm client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def each(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        end = object()
        try:
            while (item := self.run(_next(items, end))) is not end:
                yield item
        finally:
            self.run(items.aclose())  # type: ignore[attr-defined]

    def close(self, last: Any = None) -> None:
        if last is not None and self._loop.is_running():
            self.run(last())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        if not self._loop.is_running():
            self._loop.close()


async def _next(items: AsyncIterator[Any], end: object) -> Any:
    return await anext(items, end)
