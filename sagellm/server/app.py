"""The routes, and the server's life: it listens at once, answers 503 while the model loads, and drains at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from sagellm import __version__
from sagellm.engine.engine import SageLLMEngine
from sagellm.server import debug, errors
from sagellm.server.chat import chat
from sagellm.server.completions import complete
from sagellm.server.config import ServerConfig
from sagellm.server.embeddings import embed
from sagellm.server.errors import APIError
from sagellm.server.guard import Guard
from sagellm.server.state import ServerState
from sagellm.server.types import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "A parameter is wrong, unknown or not supported; `param` names it.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        413: "The body is too large.",
        429: "The queue is full; `Retry-After` says when to come again.",
        503: "The model is being loaded, or the server shuts down.",
    }.items()
}


class BoundedRequest(Request):
    """Reads JSON with bounds on nesting, and without NaN and the infinities."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is no valid JSON: {error}") from error


class BoundedRoute(APIRoute):
    """Bodies are read as `BoundedRequest` does."""

    def get_route_handler(self) -> Callable:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(BoundedRequest(request.scope, request.receive))

        return handler


def make_app(
    config: ServerConfig, make_engine: Callable[[], SageLLMEngine], on_failure: Callable[[str], None]
) -> FastAPI:
    """`on_failure` hears, in one line, why the engine cannot be had; the server then has no purpose."""
    state = ServerState(config, make_engine)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async def load() -> None:
            try:
                await state.load()
            except Exception as error:
                on_failure(state.error or f"{type(error).__name__}: {error}")

        loading = asyncio.create_task(load())
        yield
        loading.cancel()
        with suppress(asyncio.CancelledError):
            await loading
        await state.drain()

    return _app(state, life)


def app_of(engine: SageLLMEngine, config: ServerConfig | None = None) -> FastAPI:
    """The routes over an engine that is there already, and that goes on when they end."""
    return _app(ServerState.over(engine, config or ServerConfig()))


def _app(state: ServerState, life: Any = None) -> FastAPI:
    config = state.config
    app = FastAPI(title="sageLLM", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.server = state
    app.router.route_class = BoundedRoute
    errors.install(app)
    _routes(app, state)
    if config.debug_routes:
        debug.routes(app, state)
    app.add_middleware(Guard, keys=config.api_keys, max_body_bytes=config.max_body_bytes)
    return app


def _routes(app: FastAPI, state: ServerState) -> None:
    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> dict[str, str]:
        """200 when requests can be sent."""
        if state.trouble:
            raise APIError(503, state.trouble, code="not_ready")
        return {"status": "ok"}

    @app.get("/ready", responses={503: ERRORS[503]})
    async def ready() -> dict[str, str]:
        """The same, behind the key."""
        return await health()

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/info", responses={503: ERRORS[503]})
    async def info() -> dict[str, Any]:
        """The model, what the backend can do, and the form of the KV cache."""
        engine = state.ready()
        return {
            "version": __version__,
            "engine_kind": "sagellm",
            "model": state.model_name,
            "capability": engine.get_capability().to_dict(),
            "kv_schema": engine.get_kv_schema().to_dict(),
        }

    @app.get("/metrics", response_class=PlainTextResponse, responses={503: ERRORS[503]})
    async def metrics() -> PlainTextResponse:
        """For Prometheus."""
        engine = state.ready()
        return PlainTextResponse(
            await asyncio.to_thread(engine.metrics), media_type="text/plain; version=0.0.4"
        )

    @app.get("/v1/models", responses={503: ERRORS[503]})
    async def models() -> dict[str, Any]:
        engine = state.ready()
        model = {
            "id": state.model_name,
            "object": "model",
            "created": state.created,
            "owned_by": "sagellm",
            "max_model_len": engine.get_capability().max_sequence_length,
        }
        return {"object": "list", "data": [model]}

    @app.post("/v1/completions", responses=ERRORS, response_model=None)
    async def completions(request: Request, given: CompletionRequest):
        """What follows a prompt."""
        return await complete(request, state, given)

    @app.post("/v1/chat/completions", responses=ERRORS, response_model=None)
    async def chat_completions(request: Request, given: ChatRequest):
        """The next message of a conversation."""
        return await chat(request, state, given)

    @app.post("/v1/embeddings", responses=ERRORS)
    async def embeddings(request: Request, given: EmbeddingRequest) -> dict[str, Any]:
        """A vector for each input: its hidden states, pooled."""
        return await embed(request, state, given)

    @app.post("/tokenize", responses=ERRORS)
    async def tokenize(given: TokenizeRequest) -> dict[str, Any]:
        engine = state.serving(given.model)
        tokens = state.tokenizer().encode(given.prompt, add_special_tokens=given.add_special_tokens)
        longest = engine.get_capability().max_sequence_length
        return {"tokens": tokens, "count": len(tokens), "max_model_len": longest}

    @app.post("/detokenize", responses=ERRORS)
    async def detokenize(given: DetokenizeRequest) -> dict[str, str]:
        state.serving(given.model)
        return {"prompt": state.tokenizer().decode(given.tokens, skip_special_tokens=False)}
