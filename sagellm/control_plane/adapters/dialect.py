"""Servers whose API is OpenAI's but for some points: what is asked and what is answered is put right on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar

from pydantic_core import from_json, to_json

from sagellm.control_plane.endpoint import Endpoint, Reply, events
from sagellm.control_plane.features import ROUTES, needed
from sagellm.control_plane.remote import message_of
from sagellm.errors import UserError


class Dialect(Endpoint):
    """`server` as clients of OpenAI's API know it. What differs is said by the methods without an underscore."""

    HEALTH: ClassVar[str] = "/health"
    """Where the server says how it is."""

    def __init__(self, server: Endpoint, kind: str, features: frozenset[str]):
        self.server, self._kind, self._features = server, kind, features

    def asked(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A request as this server wants it."""
        return body

    def answered(self, body: Mapping[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        """An answer to `body` as OpenAI's would be."""
        return answer

    def chunk(self, body: Mapping[str, Any], chunk: dict[str, Any]) -> dict[str, Any]:
        """A piece of a stream as OpenAI's would be; an error is {"error": ...}."""
        return chunk

    def well(self, answer: Any) -> bool:
        """Whether requests can be sent, of an answer to `HEALTH` with the status 200."""
        return True

    async def send(self, method, path, body=None, headers=None, timeout=None) -> Reply:
        if path == "/health":
            return await self._health(timeout)
        if path not in ROUTES:
            return await self.server.send(method, path, body, headers, timeout)
        given: dict[str, Any] = from_json(body) if isinstance(body, bytes) else dict(body or {})
        if lacking := needed(path, given) - self._features:
            raise UserError(f"an engine of kind {self._kind} cannot serve: {', '.join(sorted(lacking))}")
        reply = await self.server.send(method, path, self.asked(path, given), headers, timeout)
        said = {name: value for name, value in reply.headers.items() if name != "content-length"}
        how = self._stream if given.get("stream") and reply.status == 200 else self._whole
        return Reply(reply.status, said, how(given, reply), reply.aclose)

    async def aclose(self) -> None:
        await self.server.aclose()

    async def _health(self, timeout: float | None) -> Reply:
        reply = await self.server.send("GET", self.HEALTH, timeout=timeout)
        body = await reply.read()
        good = reply.status == 200 and self.well(from_json(body) if body else None)

        async def pieces() -> AsyncIterator[bytes]:
            yield body

        return Reply(503 if reply.status == 200 and not good else reply.status, {}, pieces(), reply.aclose)

    async def _whole(self, given: Mapping[str, Any], reply: Reply) -> AsyncIterator[bytes]:
        if reply.status == 200:
            yield to_json(self.answered(given, await reply.json()))
            return
        text = message_of(reply.status, await reply.read()).partition(": ")[2]
        kind = "invalid_request_error" if reply.status < 500 else "server_error"
        yield to_json({"error": {"message": text, "type": kind, "param": None, "code": None}})

    async def _stream(self, given: Mapping[str, Any], reply: Reply) -> AsyncIterator[bytes]:
        async for data in events(reply):
            yield b"data: " + to_json(self.chunk(given, from_json(data))) + b"\n\n"
        yield b"data: [DONE]\n\n"
