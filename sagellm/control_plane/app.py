"""The control plane over HTTP: OpenAI's routes in front of all engines, and the routes that manage them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from sagellm import __version__
from sagellm.backends import devices
from sagellm.control_plane.adapters import ADAPTERS
from sagellm.control_plane.calls import Call
from sagellm.control_plane.endpoint import EngineLost, Reply
from sagellm.control_plane.manager import ControlPlaneManager
from sagellm.control_plane.metrics import exposition
from sagellm.control_plane.routing.ask import KINDS
from sagellm.control_plane.routing.decision import NoEngine
from sagellm.control_plane.types import RequestMetadata
from sagellm.errors import QueueFull, UserError
from sagellm.server import errors
from sagellm.server.app import BoundedRequest, BoundedRoute
from sagellm.server.errors import APIError
from sagellm.server.guard import REQUEST_ID, Guard
from sagellm.server.streams import GONE

TRACE_ID = "x-trace-id"
OBJECTIVES = {
    "x-slo-deadline-ms": ("slo_deadline_ms", float),
    "x-tbt-slo-ms": ("tbt_slo_ms", float),
    "x-cost-budget": ("cost_budget", float),
    "x-priority": ("priority", str),
    "x-preferred-engine": ("preferred_instance_id", str),
}
"""Header of a request -> field of its `RequestMetadata`."""
ABSURD = 2**53
"""Tokens that no float can count: such a wish is the engine's to refuse."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RegisterRequest(_Strict):
    engine_id: Name
    model_id: Name
    host: Name
    port: int = Field(ge=1, le=65535)
    engine_kind: Name = "llm"
    api_key: str | None = None
    metadata: dict[Name, Any] = Field({}, max_length=64)


class StartRequest(_Strict):
    model: Name
    engine_kind: Name = "sagellm"
    engine_id: Name | None = None
    port: int | None = Field(None, ge=1, le=65535)
    served_model_name: Name | None = None
    device: Name | None = None
    backend: Name | None = None
    kv_schema: Name | None = None
    tensor_parallel: int = Field(1, ge=1, le=4096)
    pipeline_parallel: int = Field(1, ge=1, le=4096)
    max_concurrent: int | None = Field(None, ge=1)
    max_model_len: int | None = Field(None, ge=1)
    extra: list[Name] = Field([], max_length=64)
    labels: dict[Name, Name] = Field({}, max_length=64)
    wait: bool = False
    """Answer once it is ready."""


def make_app(
    manager: ControlPlaneManager,
    keys: tuple[str, ...] = (),
    *,
    max_body_bytes: int = 8 * 2**20,
    drain_seconds: float = 30,
) -> FastAPI:
    """The manager's life is the application's."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await manager.start()
        yield
        await manager.stop(drain_seconds)

    app = FastAPI(
        title="sageLLM control plane", version=__version__, lifespan=life, docs_url=None, redoc_url=None
    )
    app.router.route_class = BoundedRoute
    errors.install(app)

    _openai(app, manager)

    async def no_pages(request: Request) -> None:
        """Without a key, pages of the web must not start engines through the browser of who runs this."""
        if not keys and request.headers.get("origin") is not None:
            raise APIError(403, "requests of web pages need a key; accepted: a control plane with --api-key")

    router = APIRouter(prefix="/v1/management", route_class=BoundedRoute, dependencies=[Depends(no_pages)])
    _management(router, manager)
    app.include_router(router)
    app.add_middleware(Guard, keys=keys, max_body_bytes=max_body_bytes)
    return app


class _Relayed(Response):
    """An engine's answer, from when the request is sent there; a client that goes away ends it there, at once."""

    background = None

    def __init__(self, manager: ControlPlaneManager, call: Call):
        self._manager, self._call = manager, call
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def until_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            here.reschedule(0)

        try:
            async with asyncio.timeout(None) as here:
                listens = asyncio.create_task(until_gone())
                try:
                    await self._answer(scope, receive, send)
                finally:
                    listens.cancel()
        except TimeoutError:
            if not here.expired():
                raise
            if not self._begun:
                raise APIError(GONE, "the client went away") from None

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            reply = await self._manager.submit(self._call)
        except (NoEngine, QueueFull, EngineLost) as error:
            answer = _no_answer(error, self._manager.retry_after(self._call))
            await answer(scope, receive, send)
            return
        self._begun = True
        await _pass_on(reply, scope, receive, send)


async def _pass_on(reply: Reply, scope: Scope, receive: Receive, send: Send) -> None:
    if not reply.headers.get("content-type", "").startswith("text/event-stream"):
        await Response(await reply.read(), reply.status, reply.headers)(scope, receive, send)
        return
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers.items()]
    try:
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        async for piece in reply.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        await reply.aclose()


def _openai(app: FastAPI, manager: ControlPlaneManager) -> None:
    async def relay(request: Request) -> Response:
        return _Relayed(manager, await _call(request))

    for path in KINDS:
        app.router.add_api_route(
            path,
            relay,
            methods=["POST"],
            response_model=None,
            summary="To one of the engines.",
            route_class_override=_Straight,
        )

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models of the engines that there are, each once."""
        found: dict[str, dict[str, Any]] = {}
        for member in manager.members.values():
            info = member.info
            model = {
                "id": info.model_id,
                "object": "model",
                "created": int(info.created_at),
                "owned_by": "sagellm",
            }
            known = found.setdefault(info.model_id, model | {"engines": [], "max_model_len": None})
            known["engines"].append(info.engine_id)
            longest = [n for n in (known["max_model_len"], member.longest) if n is not None]
            known["max_model_len"] = max(longest, default=None)
        return {"object": "list", "data": list(found.values())}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """200 while the control plane runs, whether or not it has engines."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        """200 when an engine takes requests."""
        some = [m.info.engine_id for m in manager.members.values() if m.info.is_accepting_requests]
        if not some:
            raise APIError(503, "no engine takes requests", code="not_ready")
        return {"status": "ok", "engines": some}

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return {"version": __version__, "engine_kind": "control-plane", "engines": len(manager.members)}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """For Prometheus."""
        return PlainTextResponse(exposition(manager), media_type="text/plain; version=0.0.4")


def _no_answer(error: NoEngine | QueueFull | EngineLost, retry_after: int) -> Response:
    if isinstance(error, NoEngine):
        return errors.answer(error.status, str(error), code=error.kind, retry_after=retry_after)
    status, code = (429, "queue_full") if isinstance(error, QueueFull) else (503, "engine_lost")
    return errors.answer(status, str(error), code=code, retry_after=retry_after)


class _Straight(APIRoute):
    """Shown and found as others are, without what finds a function's arguments in a request, which takes as long as the
    choice of an engine."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handler(request: Request) -> Response:
            return await self.endpoint(BoundedRequest(request.scope, request.receive))

        return handler


async def _call(request: Request) -> Call:
    body = await request.json()
    if not isinstance(body, dict):
        raise APIError(400, "the body is no JSON object; accepted: an object")
    for name, kinds in (("model", (str, type(None))), ("stream", (bool, type(None)))):
        if not isinstance(body.get(name), kinds):
            raise APIError(400, f"{name} is {body[name]!r}; accepted: {kinds[0].__name__}", param=name)
    path, headers = request.scope["path"], _headers(request)
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    given: dict[str, Any] = {
        "request_type": KINDS[path],
        "model_name": body.get("model"),
        "max_tokens": most if isinstance(most, int) and 0 < most < ABSURD else None,
        "user_id": body.get("user") if isinstance(body.get("user"), str) else None,
    }
    for header in OBJECTIVES.keys() & headers.keys():
        name, read = OBJECTIVES[header]
        try:
            given[name] = read(headers[header])
        except ValueError:
            message = f"{header} is {headers[header]!r}; accepted: a number"
            raise APIError(400, message, param=header) from None
    metadata = RequestMetadata(**given)
    passed_on = {REQUEST_ID: headers.get(REQUEST_ID.lower()) or metadata.request_id}
    if TRACE_ID in headers:
        passed_on[TRACE_ID] = headers[TRACE_ID]
    return Call(path, body, metadata, passed_on)


def _headers(request: Request) -> dict[str, str]:
    """By lower-case name; of one that is there several times, the first."""
    found: dict[str, str] = {}
    for name, value in request.scope["headers"]:
        found.setdefault(name.decode("latin-1"), value.decode("latin-1"))
    return found


def _management(router: APIRouter, manager: ControlPlaneManager) -> None:
    @router.get("/engines")
    async def engines() -> dict[str, Any]:
        return {"engines": [info.to_dict() for info in manager.list_registered_engines()]}

    @router.post("/engines")
    async def start(given: StartRequest) -> dict[str, Any]:
        """Start an engine on the control plane's machine, or its cluster."""
        fields = given.model_dump(exclude={"labels", "wait", "extra"})
        metadata = {"labels": given.labels} if given.labels else {}
        info = await manager.request_engine_startup(**fields, extra=tuple(given.extra), metadata=metadata)
        if given.wait:
            info = await manager.wait_until_ready(info.engine_id)
        return info.to_dict()

    @router.post("/engines/register")
    async def register(given: RegisterRequest) -> dict[str, Any]:
        """An engine that runs, or will, at an address."""
        return manager.register_engine(**given.model_dump()).to_dict()

    @router.post("/engines/prune")
    async def prune() -> dict[str, Any]:
        """Forget the engines that are lost."""
        return {"removed": manager.prune()}

    @router.get("/engines/{engine_id}")
    async def engine(engine_id: str) -> dict[str, Any]:
        _known(manager, engine_id)
        return manager.get_engine_info(engine_id).to_dict()

    @router.delete("/engines/{engine_id}")
    async def remove(
        engine_id: str, drain: bool = True, drain_s: Annotated[float, Query(ge=0, le=3600)] = 30
    ) -> dict[str, Any]:
        """Stop an engine that was started here, or forget one that was registered."""
        _known(manager, engine_id)
        return (await manager.stop_engine_gracefully(engine_id, drain_s if drain else 0)).to_dict()

    @router.post("/engines/{engine_id}/drain")
    async def drain(engine_id: str) -> dict[str, Any]:
        """Send it nothing new."""
        _known(manager, engine_id)
        return (await manager.start_engine_drain(engine_id)).to_dict()

    @router.post("/engines/{engine_id}/heartbeat")
    async def heartbeat(engine_id: str) -> dict[str, Any]:
        _known(manager, engine_id)
        manager.record_engine_heartbeat(engine_id)
        return manager.get_engine_info(engine_id).to_dict()

    @router.get("/engines/{engine_id}/logs")
    async def logs(engine_id: str, lines: Annotated[int, Query(ge=1, le=10_000)] = 100) -> dict[str, Any]:
        _known(manager, engine_id)
        return {"lines": await manager.engine_log(engine_id, lines)}

    @router.get("/status")
    async def status() -> dict[str, Any]:
        return manager.get_cluster_status()

    @router.get("/decisions")
    async def decisions(limit: Annotated[int, Query(ge=1, le=10_000)] = 100) -> dict[str, Any]:
        """Where the last requests went and why, the latest first."""
        return {
            "decisions": [
                decision.to_dict() for decision in list(manager.router.decisions)[: -limit - 1 : -1]
            ]
        }

    @router.get("/requests/{request_id}")
    async def request(request_id: str) -> dict[str, Any]:
        try:
            return manager.get_request_status(request_id)
        except UserError as error:
            raise APIError(404, str(error)) from error

    @router.get("/backends")
    async def backends() -> dict[str, Any]:
        """Kinds of engines, and which of them serve which models here."""
        served = {kind: [] for kind in ADAPTERS}
        for info in manager.list_registered_engines():
            served.setdefault(info.engine_kind, []).append(info.model_id)
        return {"backends": [{"kind": kind, "models": models} for kind, models in served.items()]}

    @router.get("/gpu")
    async def gpu() -> dict[str, Any]:
        """Accelerators of the control plane's machine, and what was looked for."""
        known = devices.vendors()
        return {"devices": {v.name: devices.probe(v, known).to_dict() for v in known}}


def _known(manager: ControlPlaneManager, engine_id: str) -> None:
    if engine_id not in manager.members:
        names = ", ".join(manager.members) or "none"
        raise APIError(404, f"unknown engine {engine_id!r}; accepted: {names}", code="unknown_engine")
