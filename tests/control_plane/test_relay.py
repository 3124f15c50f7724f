"""What passing an answer on costs, and what becomes of the connection it came over."""

import asyncio
import gc
import json
import sys

import pytest
from planes import run, served
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from sagellm.control_plane.app import make_app
from sagellm.control_plane.endpoint import Endpoint, Reply, events
from sagellm.control_plane.frame import Frame
from sagellm.control_plane.journal import StreamJournal
from sagellm.control_plane.manager import ControlPlaneManager
from sagellm.control_plane.remote import RemoteEngine

MODELS = json.dumps({"data": [{"id": "m"}]}).encode()
BODY = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 500, "stream": True}


def event(number: int) -> bytes:
    choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": None, "token_ids": [number]}
    chunk = {"id": "x", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


class Talking(Endpoint):
    """An engine's server whose streams have so many pieces, with so many events together."""

    def __init__(self, pieces: int, together: int = 1):
        made = [event(number) for number in range(pieces * together)]
        self.said = [b"".join(made[at : at + together]) for at in range(0, len(made), together)]

    async def send(self, method, path, body=None, headers=None, timeout=None):
        async def pieces():
            if path != "/v1/completions":
                yield MODELS if path == "/v1/models" else b"{}"
                return
            for piece in self.said:
                yield piece
            yield b"data: [DONE]\n\n"

        async def close():
            return None

        return Reply(200, {}, pieces(), close)

    async def aclose(self):
        return None


async def asked(app) -> list[bytes]:
    """What a request's client is written, piece by piece."""
    said, sent = [], [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]

    async def receive():
        return sent.pop() if sent else await asyncio.Event().wait()

    async def send(message):
        said.append(message.get("body", b""))

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"",
        "root_path": "", "headers": [(b"content-type", b"application/json")], "client": None, "server": ("h", 80),
    }  # fmt: skip
    await app(scope, receive, send)
    return [piece for piece in said if piece]


def calls_of(pieces: int, together: int = 1) -> tuple[int, list[bytes]]:
    """Calls of Python and of C functions for one stream through the control plane, and what came of it."""

    async def main():
        manager = ControlPlaneManager(probe_every=1000.0)
        await manager.start()
        manager.register_engine("e", RemoteEngine(Talking(pieces, together), engine_id="e"))
        await manager.wait_until_ready("e")
        app, count = make_app(manager), 0

        def seen(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        await asked(app)
        gc.disable()  # others may have asked to be called when it collects
        sys.setprofile(seen)
        try:
            said = await asked(app)
        finally:
            sys.setprofile(None)
            gc.enable()
        await manager.stop()
        return count, said

    return run(main())


def test_a_piece_takes_few_calls_and_events_that_come_together_go_together():
    short, said = calls_of(100)
    assert len(said) == 101 and said[-1] == b"data: [DONE]\n\n"
    long, _ = calls_of(200)
    together, said = calls_of(10, together=10)
    assert len(said) == 11 and said[0].count(b"data: ") == 10
    assert long - short < 100 * 35
    assert short - (long - short) < 800
    assert together < short / 2


def test_a_connection_whose_stream_has_ended_serves_the_next_one():
    """And the client hears the end at once, however long the engine's server takes behind its last event."""
    clients = set()

    async def completions(request):
        clients.add(request.client.port)

        async def pieces():
            yield event(1)
            yield b"data: [DONE]\n\n"
            await asyncio.sleep(0.05)

        return StreamingResponse(pieces(), media_type="text/event-stream")

    async def main():
        app = Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])
        async with served(app) as port:
            manager = ControlPlaneManager(probe_every=1000.0)
            await manager.start()
            engine = RemoteEngine(f"http://127.0.0.1:{port}", "m", engine_id="e")
            manager.register_engine("e", engine)
            manager.record_engine_heartbeat("e")
            front = make_app(manager)
            for _ in range(3):
                assert b"".join(await asked(front)).endswith(b"data: [DONE]\n\n")
                await asyncio.sleep(0.1)
            await manager.stop()
        return len(clients)

    assert run(main()) <= 2, "of the first stream, and of the probe beside it"


def test_events_are_cut_where_they_end_and_not_where_pieces_do():
    data = b"".join(event(number) for number in range(5)) + b"data: [DONE]\n\n"

    async def read(size):
        async def pieces():
            for at in range(0, len(data), size):
                yield data[at : at + size]

        async def close():
            return None

        return [one async for one in events(Reply(200, {}, pieces(), close))]

    whole = asyncio.run(read(len(data)))
    assert len(whole) == 5 and all(asyncio.run(read(size)) == whole for size in (1, 7, 100))


TEXTS = [
    " word",
    "",
    " two words",
    'a "quote"',
    "back\\slash",
    "\n",
    "é",
    "你好",
    ",",
    '","token_ids":[5]',
    "word",
]


def chunks_of(chat: bool, compact: bool) -> list[bytes]:
    made = []
    for number, text in enumerate(["word", *TEXTS, *TEXTS]):
        said = {"delta": {"content": text}} if chat else {"text": text}
        choice = {
            "index": 0,
            **said,
            "logprobs": None,
            "finish_reason": None,
            "token_ids": [number, number + 1],
        }
        if not number:
            choice["prompt_token_ids"] = [1, 2]
        made.append({"id": "x", "created": 1, "model": "m", "choices": [choice], "usage": None})
    made.append(made[-1] | {"choices": [made[-1]["choices"][0] | {"finish_reason": "length"}]})
    return [json.dumps(one, separators=(",", ":") if compact else None).encode() for one in made]


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("path, chat", [("/v1/completions", False), ("/v1/chat/completions", True)])
def test_a_chunk_like_the_one_before_is_passed_on_as_if_it_were_read(monkeypatch, path, chat, compact):
    def passed_on():
        journal, chunks = StreamJournal(path, {"prompt": "x"}), chunks_of(chat, compact)
        said = [journal.take([chunk])[0] for chunk in chunks]
        return [json.loads(one[6:]) if one else None for one in said], journal.tokens, journal.finish_reason

    with monkeypatch.context() as patch:
        patch.setattr(Frame, "of", lambda *of: None)
        expected = passed_on()
    assert passed_on() == expected
    assert not any("token_ids" in one["choices"][0] for one in expected[0] if one)
    assert expected[0].count(None) == 2 and expected[1:] == (2 * (2 * len(TEXTS) + 2), "length")


def test_a_frame_is_made_only_where_text_and_ids_can_be_told_from_the_rest():
    chunk = b'{"id":"x","model":"m","choices":[{"index":0,"text":"a","token_ids":[3]}]}'
    told = b'{"id":"x","model":"m","choices":[{"index":0,"text":"a"}]}'
    frame = Frame.of(chunk, told, "a", [3])
    assert frame.read(chunk.replace(b'"a"', b'"bc"').replace(b"[3]", b"[4,5]")) == (
        told.replace(b'"a"', b'"bc"'),
        [4, 5],
    )
    for other in (b'"finish_reason":"stop",', b'"index":1,'):
        assert frame.read(chunk.replace(b'"index":0,', other)) is None
    assert (
        frame.read(chunk.replace(b"[3]", b"[]")) is None
        and frame.read(chunk.replace(b"[3]", b"null")) is None
    )
    assert Frame.of(chunk.replace(b'"m"', b'"a"'), told.replace(b'"m"', b'"a"'), "a", [3]) is None
    assert Frame.of(chunk.replace(b",", b", "), told, "b", [3]) is None
