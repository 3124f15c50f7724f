"""Servers that answer as LMDeploy's and Chitu's do, for adapters to be tested without the GPUs that these need.

What they do was read in LMDeploy 0.16.0 (docs/en/advance/metrics.md, lmdeploy/serve/openai, lmdeploy/serve/core) and
in Chitu as of August 2026, after 0.5 (docs/en/API_PARAMETERS.md, CLI.md, METRICS.md, chitu/serve). The model says its
prompt again: a token is a byte, and a full stop ends the output. Where a server surprises a client of OpenAI's API, a
comment says so.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import cycle, islice, pairwise

import uvicorn
from attrs import define, field
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

END = ord(".")


@define
class Engine:
    """What a server was asked, and what came of it."""

    model: str
    pace: float = 0.0
    """Seconds a token."""
    status: str = "healthy"
    fails_after: int | None = None
    """Tokens, after which a request fails."""
    asked: list[tuple[str, dict]] = field(factory=list)
    """Path and body of each request."""
    running: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    generated: int = 0

    async def tokens(self, prompt: list[int], limit: int) -> AsyncIterator[tuple[int, str | None]]:
        """Each token, with the reason to finish behind the last."""
        self.running += 1
        self.prompt_tokens += len(prompt)
        try:
            for count, token in enumerate(islice(cycle(prompt), limit), 1):
                await asyncio.sleep(self.pace)
                if self.fails_after is not None and count > self.fails_after:
                    raise RuntimeError("the device was lost")
                self.generated += 1
                yield token, "stop" if token == END else "length" if count == limit else None
                if token == END:
                    return
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise
        finally:
            self.running -= 1


def ids_of(body: dict) -> list[int]:
    """The prompt of any of the requests; a conversation is its last message."""
    given = body.get("input_ids") or body.get("prompt")
    if given is None:
        given = body["messages"] if isinstance(body["messages"], str) else body["messages"][-1]["content"]
    return list(given.encode()) if isinstance(given, str) else list(given)


def event(data: dict | str) -> str:
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"


@contextmanager
def running(app: Starlette) -> Iterator[str]:
    """The address of a server of this app, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


LMDEPLOY_METRICS = """\
# HELP lmdeploy:num_requests_running Number of requests in model execution batches.
# TYPE lmdeploy:num_requests_running gauge
lmdeploy:num_requests_running{{engine="0",model_name="{model}"}} {running}.0
# TYPE lmdeploy:num_requests_waiting gauge
lmdeploy:num_requests_waiting{{engine="0",model_name="{model}"}} 0.0
# TYPE lmdeploy:gpu_cache_usage_perc gauge
lmdeploy:gpu_cache_usage_perc{{engine="0",model_name="{model}"}} 0.25
# TYPE lmdeploy:prompt_tokens_total counter
lmdeploy:prompt_tokens_total{{engine="0",model_name="{model}"}} {prompt}.0
# TYPE lmdeploy:generation_tokens_total counter
lmdeploy:generation_tokens_total{{engine="0",model_name="{model}"}} {generated}.0
# TYPE lmdeploy:cached_tokens_total counter
lmdeploy:cached_tokens_total{{engine="0",model_name="{model}"}} 7.0
"""


def lmdeploy(engine: Engine) -> Starlette:
    """`lmdeploy serve api_server`, version 0.16.0."""

    def refuse(status: int, message: str) -> JSONResponse:
        # no {"error": ...} around it, and the code is the status
        kind = {404: "not_found_error", 503: "server_error"}.get(status, "invalid_request_error")
        content = {"message": message, "type": kind, "code": status, "param": None, "object": "error"}
        return JSONResponse(content, status)

    async def health(request: Request) -> Response:
        # an engine that sleeps is healthy, and answers no request
        good = engine.status in ("healthy", "sleeping")
        return JSONResponse({"status": engine.status, "message": "..."}, 200 if good else 503)

    async def models(request: Request) -> Response:
        # nothing says how long a context may be
        card = {
            "id": engine.model,
            "object": "model",
            "created": 1,
            "owned_by": "lmdeploy",
            "root": engine.model,
        }
        return JSONResponse({"object": "list", "data": [card | {"parent": None, "permission": []}]})

    async def asked(request: Request) -> dict | Response:
        body = await request.json()
        engine.asked.append((request.url.path, body))
        if engine.status == "sleeping":
            return refuse(503, "Engine is sleeping; call POST /wakeup before inference.")
        if "model" in body and body["model"] != engine.model:
            return refuse(404, f"The model {body['model']!r} does not exist.")
        if not 0 <= (body.get("temperature") or 0) <= 2:
            return refuse(400, f"The temperature {body['temperature']!r} must be in [0, 2]")
        if body.get("top_k") is not None and body["top_k"] < 0:
            return refuse(400, f"The top_k {body['top_k']!r} cannot be a negative integer.")
        if request.url.path == "/v1/chat/completions" and body.get("logprobs"):
            return refuse(
                400, "Logprobs(True)/top_logprobs(0) requested but not enabled logprobs_mode in engine"
            )
        return body

    def usage_of(prompt: list[int], made: int) -> dict:
        return {"prompt_tokens": len(prompt), "total_tokens": len(prompt) + made, "completion_tokens": made}

    async def answer(request: Request, name: str, kind: str) -> Response:
        """Both of OpenAI's routes; `kind` is `chat.completion` or `text_completion`."""
        body = await asked(request)
        if isinstance(body, Response):
            return body
        chat, prompt = kind == "chat.completion", ids_of(body)
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        head = {"id": name, "created": 1, "model": engine.model}
        with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        details = {"prompt_tokens_details": {"cached_tokens": 0}} if chat else {}

        async def stream() -> AsyncIterator[str]:
            made = 0
            try:
                async for token, reason in engine.tokens(prompt, limit):
                    made += 1
                    said = (
                        {"delta": {"role": "assistant", "content": chr(token)}}
                        if chat
                        else {"text": chr(token)}
                    )
                    choice = {"index": 0} | said | ({"finish_reason": reason} if reason else {})
                    chunk = head | {"object": kind + ".chunk" * chat, "choices": [choice]}
                    yield event(chunk | {"usage": None} if with_usage else chunk)
                if with_usage:
                    yield event(head | {"choices": [], "usage": usage_of(prompt, made) | details})
            except RuntimeError as error:
                # an error ends as a whole stream does
                content = {
                    "message": str(error),
                    "type": "server_error",
                    "code": 500,
                    "param": None,
                    "object": "error",
                }
                yield event({"error": content})
            yield event("[DONE]")

        if body.get("stream"):
            return StreamingResponse(stream(), media_type="text/event-stream")
        made = [pair async for pair in engine.tokens(prompt, limit)]
        text = bytes(token for token, _ in made).decode()
        said = (
            {"message": {"role": "assistant", "content": text, "tool_calls": None}}
            if chat
            else {"text": text}
        )
        choice = {"index": 0, "logprobs": None, "finish_reason": made[-1][1]} | said
        whole = head | {"object": kind, "choices": [choice], "usage": usage_of(prompt, len(made)) | details}
        return JSONResponse(whole)

    async def chat(request: Request) -> Response:
        return await answer(request, "chatcmpl-3fKq", "chat.completion")

    async def completions(request: Request) -> Response:
        # a list is a list of prompts: token ids would each be one
        return await answer(request, "17", "text_completion")

    async def generate(request: Request) -> Response:
        body = await asked(request)
        if isinstance(body, Response):
            return body
        prompt, made = ids_of(body), 0

        def piece(tokens: list[int], reason: str | None) -> dict:
            end = {"type": reason} if reason else None
            meta = {"prompt_tokens": len(prompt), "completion_tokens": made, "finish_reason": end}
            meta |= {"output_token_logprobs": None, "routed_experts": None}
            return {"text": bytes(tokens).decode(), "output_ids": tokens, "meta_info": meta}

        async def stream() -> AsyncIterator[str]:
            nonlocal made
            async for token, reason in engine.tokens(prompt, body.get("max_tokens", 128)):
                made += 1
                yield event(piece([token], reason))
            yield event("[DONE]")

        if body.get("stream"):
            return StreamingResponse(stream(), media_type="text/event-stream")
        pairs = [pair async for pair in engine.tokens(prompt, body.get("max_tokens", 128))]
        made = len(pairs)
        return JSONResponse(piece([token for token, _ in pairs], pairs[-1][1]))

    async def encode(request: Request) -> Response:
        text = (await request.json())["input"]
        return JSONResponse({"input_ids": list(text.encode()), "length": len(text.encode())})

    async def embeddings(request: Request) -> Response:
        return refuse(400, "Unsupported by turbomind.")

    async def abort_request(request: Request) -> Response:
        said = "This server does not support abort requests. Enable with --enable-abort-handling flag."
        return PlainTextResponse(said, 501)

    async def metrics(request: Request) -> Response:
        counts = {"running": engine.running, "prompt": engine.prompt_tokens, "generated": engine.generated}
        return PlainTextResponse(LMDEPLOY_METRICS.format(model=engine.model, **counts))

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/metrics", metrics),
            *(
                Route(path, handler, methods=["POST"])
                for path, handler in {
                    "/v1/chat/completions": chat,
                    "/v1/completions": completions,
                    "/generate": generate,
                    "/v1/encode": encode,
                    "/v1/embeddings": embeddings,
                    "/abort_request": abort_request,
                }.items()
            ),
        ]
    )


def chitu(engine: Engine) -> Starlette:
    """`torchrun -m chitu`, as of August 2026."""

    def refuse(status: int, message: str) -> JSONResponse:
        return JSONResponse({"detail": message}, status)

    async def models(request: Request) -> Response:
        card = {"id": engine.model, "object": "model", "created": 0, "owned_by": "unknown"}
        return JSONResponse({"object": "list", "data": [card]})

    async def server_status(request: Request) -> Response:
        # there is no /health
        return JSONResponse({"initialized": engine.status == "healthy"})

    async def load_status(request: Request) -> Response:
        # a POST, of numbers as text; handle_reqs are those that run and those that wait
        counts = {"load_score": str(engine.prompt_tokens), "handle_reqs": str(engine.running)}
        return JSONResponse(counts | {"max_batch_size": "8", "max_concurrent_requests": "16"})

    async def answer(request: Request, chat: bool) -> Response:
        body = await request.json()
        engine.asked.append((request.url.path, body))
        if engine.status != "healthy":
            return refuse(503, "Service is not started")
        if engine.running >= 16:
            return JSONResponse({"error": {"message": "Server overloaded", "type": "overloaded"}}, 503)
        prompt, limit = ids_of(body), body.get("max_completion_tokens") or body.get("max_tokens") or 16
        if len(prompt) >= 4096:
            return refuse(400, f"prompt length({len(prompt)}) cannot be greater than max_seq_len(4096)")
        # every chunk is called a whole completion; numbers of cached tokens stand beside the others
        head = {"id": "5d1c90ab", "object": "chat.completion" if chat else "text_completion", "created": 1}
        options = body.get("stream_options") or {}
        with_usage = options.get("include_usage", not chat)
        made: asyncio.Queue[tuple[int, str | None] | Exception | None] = asyncio.Queue()

        async def compute() -> None:
            try:
                async for pair in engine.tokens(prompt, limit):
                    made.put_nowait(pair)
            except RuntimeError as error:
                made.put_nowait(error)
            made.put_nowait(None)

        # a client that goes away ends its stream, not the work
        tasks.add(task := asyncio.create_task(compute()))
        task.add_done_callback(tasks.discard)

        def usage(count: int) -> dict:
            counts = {
                "prompt_tokens": len(prompt),
                "completion_tokens": count,
                "total_tokens": len(prompt) + count,
            }
            return {"usage": counts | {"cached_token": 0}}

        async def stream() -> AsyncIterator[str]:
            count, end = 0, None
            while (got := await made.get()) is not None:
                if isinstance(got, Exception):
                    yield event({"detail": str(got)})  # and no [DONE]
                    return
                count, end = count + 1, got[1]
                said = {"delta": {"content": chr(got[0])}} if chat else {"text": chr(got[0])}
                nothing = {"logprobs": None, "finish_reason": None}
                yield event(head | {"choices": [{"index": 0} | said | nothing]})
            said = {"delta": {"content": ""}} if chat else {"text": ""}
            last = head | {"choices": [{"index": 0, "finish_reason": end} | said]}
            yield event(last | usage(count) if with_usage and not chat else last)
            if with_usage and chat:
                yield event(head | {"choices": []} | usage(count))
            yield event("[DONE]")

        if body.get("stream"):
            return StreamingResponse(stream(), media_type="text/event-stream")
        pairs = []
        while (got := await made.get()) is not None:
            if isinstance(got, Exception):
                return refuse(500, str(got))
            pairs.append(got)
        text = bytes(token for token, _ in pairs).decode()
        # nothing says why a chat ended
        said = (
            {"message": {"role": "assistant", "content": text}}
            if chat
            else {"text": text, "finish_reason": pairs[-1][1]}
        )
        whole = head | {"choices": [{"index": 0, "logprobs": None} | said], "model": engine.model}
        return JSONResponse(whole | usage(len(pairs)))

    async def chat(request: Request) -> Response:
        return await answer(request, True)

    async def completions(request: Request) -> Response:
        return await answer(request, False)

    async def tokenize(request: Request) -> Response:
        return JSONResponse({"tokens": ids_of(await request.json())})

    async def ping(request: Request) -> Response:
        return JSONResponse({"message": "Connection succeeded"})

    tasks: set[asyncio.Task] = set()
    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/server_status", server_status),
            *(
                Route(path, handler, methods=["POST"])
                for path, handler in {
                    "/load_status": load_status,
                    "/ping": ping,
                    "/tokenize": tokenize,
                    "/v1/chat/completions": chat,
                    "/v1/completions": completions,
                }.items()
            ),
        ]
    )


def main(kind: str, arguments: list[str]) -> None:
    """What `lmdeploy serve api_server MODEL ...` and `torchrun ... -m chitu ...` take, as far as it matters here."""
    if kind == "lmdeploy":
        given = dict(pairwise(arguments))
        app, port = lmdeploy(Engine(given["--model-name"])), given["--server-port"]
    else:
        given = dict(word.split("=", 1) for word in arguments if "=" in word)
        app, port = chitu(Engine(given["models"])), given["serve.port"]
    uvicorn.run(app, port=int(port), log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
