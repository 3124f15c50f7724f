"""What a request meets before any route: the key, the size of its body, its id."""

from __future__ import annotations

import hmac
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sagellm.server.errors import answer

OPEN = frozenset({"/health"})
"""Routes that need no key."""
REQUEST_ID = "X-Request-ID"
MAX_ID = 128
TOO_LARGE = "body_too_large"


class Guard:
    """Pure ASGI, so that streams pass through untouched."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], max_body_bytes: int):
        self.app, self.max_body_bytes = app, max_body_bytes
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        send = _with_id(send, headers.get(REQUEST_ID))
        if scope["path"] not in OPEN and not self._knows(headers.get("authorization", "")):
            refusal = answer(401, "the API key is missing or wrong", code="invalid_api_key")
            await refusal(scope, receive, send)
            return
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.max_body_bytes:
            await answer(413, self._too_large, code=TOO_LARGE)(scope, receive, send)
            return
        await self.app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        """For bodies that do not say how long they are."""
        seen = 0

        async def receiving() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return receiving

    def _knows(self, authorization: str) -> bool:
        """Compares with every key in constant time, whichever fits."""
        if not self._keys:
            return True
        scheme, _, given = authorization.partition(" ")
        fits = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        return scheme.lower() == "bearer" and any(fits)

    @property
    def _too_large(self) -> str:
        return f"the body is larger than {self.max_body_bytes} bytes"


def _with_id(send: Send, given: str | None) -> Send:
    """Answers carry the id that came with the request, or one of their own."""
    fine = given is not None and given.isascii() and given.isprintable() and 0 < len(given) <= MAX_ID
    name = given if fine and given else uuid.uuid4().hex

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)[REQUEST_ID] = name
        await send(message)

    return sending
