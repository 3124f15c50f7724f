"""How an engine's HTTP API is spoken to: over a network, or straight to an application in this process."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import aiohttp
from attrs import define
from pydantic_core import from_json, to_json

CONNECT_SECONDS = 3.0
DISCONNECT_SECONDS = 1.0
"""That an application in this process has to notice that its client is gone."""
KEPT_SECONDS = 3.0
"""That a connection is kept for the next request: uvicorn's servers close theirs after 5, and none may be used as it
closes."""
TEXT = {"content-type": "application/json"}


FAILURES = (aiohttp.ClientError, OSError, TimeoutError)
"""What aiohttp raises."""


class EngineLost(Exception):
    """Nobody answers, or an answer broke off. What it would have been is not known."""


@define
class Reply:
    """An answer that has begun."""

    status: int
    headers: Mapping[str, str]
    """By lower-case name."""
    pieces: AsyncIterator[bytes]
    """The body as it comes; raises EngineLost where it breaks off."""
    aclose: Callable[[], Awaitable[None]]
    """End the request, whether or not the body was read; who reads it gets EngineLost. May be called again."""

    async def read(self) -> bytes:
        """The whole body."""
        try:
            return b"".join([piece async for piece in self.pieces])
        finally:
            await self.aclose()

    async def json(self) -> Any:
        """Raises EngineLost for what is no JSON."""
        body = await self.read()
        try:
            return from_json(body)
        except ValueError as error:
            raise EngineLost(f"the answer is no JSON: {body[:200]!r}") from error


class Endpoint(ABC):
    """One engine's API."""

    @abstractmethod
    async def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Reply:
        """The answer's head, and its body to be read. `body` is sent as JSON; bytes are, as they are.

        Raises EngineLost where nobody answers within `timeout` seconds, or none at all.
        """

    @abstractmethod
    async def aclose(self) -> None: ...


def _encoded(body: Any) -> bytes | None:
    return body if body is None or isinstance(body, bytes) else to_json(body)


class HttpEndpoint(Endpoint):
    """A server at an address such as http://127.0.0.1:8901. Its connections are of the event loop that sends first."""

    def __init__(self, address: str, api_key: str | None = None):
        self.address = address.rstrip("/")
        # bodies are passed on as they come, and that some are compressed would not be said to the client
        self._headers = {"Accept-Encoding": "identity"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None
        self._over = False

    def _open(self) -> aiohttp.ClientSession:
        if self._over:
            raise EngineLost(f"{self.address}: this side has ended")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                auto_decompress=False,
                read_bufsize=2**18,
            )
        return self._session

    async def send(self, method, path, body=None, headers=None, timeout=None) -> Reply:
        data = _encoded(body)
        request = self._open().request(
            method, self.address + path, data=data, headers={**(TEXT if data else {}), **(headers or {})}
        )
        try:
            answer = await (request if timeout is None else asyncio.wait_for(request, timeout))
        except FAILURES as error:
            raise EngineLost(f"{self.address}: {error or type(error).__name__}") from error

        async def close() -> None:
            answer.release() if answer.content.at_eof() else answer.close()

        found = {name.lower(): value for name, value in answer.headers.items()}
        return Reply(answer.status, found, _Pieces(self.address, answer.content), close)

    async def aclose(self) -> None:
        self._over = True
        if self._session is not None:
            await self._session.close()


class _Pieces(AsyncIterator[bytes]):
    """A body as it comes. No generator, which the event loop would note and forget for each request."""

    def __init__(self, address: str, content: aiohttp.StreamReader):
        self._address, self._content = address, content

    async def __anext__(self) -> bytes:
        try:
            piece = await self._content.readany()
        except FAILURES as error:
            raise EngineLost(f"{self._address}: {error or type(error).__name__}") from error
        if not piece:
            raise StopAsyncIteration
        return piece


class AppEndpoint(Endpoint):
    """An ASGI application in this process and event loop; its life-span is not run."""

    def __init__(self, app: Any):
        self._app = app

    async def send(self, method, path, body=None, headers=None, timeout=None) -> Reply:
        data = _encoded(body) or b""
        path, _, query = path.partition("?")
        fields = {"host": "in-process", "content-length": str(len(data)), **TEXT, **(headers or {})}
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": method, "scheme": "http", "path": path, "raw_path": path.encode(),
            "query_string": query.encode(), "root_path": "", "server": ("in-process", 80), "client": None,
            "headers": [(name.lower().encode(), value.encode()) for name, value in fields.items()],
        }  # fmt: skip
        gone, sent, said = asyncio.Event(), False, asyncio.Queue[Any](64)

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": data, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(scope, receive, said.put)
            except Exception as error:
                await said.put(error)

        async def hear() -> dict[str, Any]:
            message = await said.get()
            if isinstance(message, EngineLost):
                raise message
            if isinstance(message, Exception):
                raise EngineLost(f"{type(message).__name__}: {message}") from message
            return message

        async def pieces() -> AsyncIterator[bytes]:
            more = True
            while more:
                message = await hear()
                more = message.get("more_body", False)
                if message.get("body"):
                    yield message["body"]

        def forget() -> None:
            while not said.empty():
                said.get_nowait()

        async def close() -> None:
            """The application hears that the client is gone, as it would from a server."""
            gone.set()
            ends = asyncio.create_task(asyncio.wait([task], timeout=DISCONNECT_SECONDS))
            while not ends.done():
                forget()
                await asyncio.wait([ends], timeout=0.01)
            if not task.done():
                task.cancel()
            forget()
            said.put_nowait(EngineLost("the request was ended"))

        task = asyncio.create_task(run())
        try:
            head = await asyncio.wait_for(hear(), timeout)
        except TimeoutError as error:
            task.cancel()
            raise EngineLost(f"no answer within {timeout} s") from error
        except BaseException:
            task.cancel()
            raise
        found = {name.decode().lower(): value.decode() for name, value in head["headers"]}
        return Reply(head["status"], found, pieces(), close)

    async def aclose(self) -> None:
        return None


async def events(reply: Reply) -> AsyncIterator[bytes]:
    """The data of server-sent events, without the last, `[DONE]`. Raises EngineLost where that does not come."""
    found = Batches(reply)
    while (some := await found.next()) is not None:
        for data in some:
            yield data


class Batches:
    """As `events`, with those that came together at once."""

    def __init__(self, reply: Reply):
        self._pieces, self._rest, self._done = reply.pieces, b"", False

    async def next(self) -> list[bytes] | None:
        """None: the stream has ended. Raises EngineLost."""
        while not self._done:
            piece = await anext(self._pieces, None)
            if piece is None:
                raise EngineLost("the stream broke off")
            *lines, self._rest = (self._rest + piece).split(b"\n")
            found = [line[5:].strip() for line in lines if line[:5] == b"data:"]
            if b"[DONE]" in found:
                self._done = True
                del found[found.index(b"[DONE]") :]
            if found:
                return found
        return None
