"""The control plane over HTTP: OpenAI's routes in front of all engines, and the routes that manage them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.responses import PlainTextResponse, Response, StreamingResponse
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
from sagellm.server.app import BoundedRoute
from sagellm.server.errors import APIError
from sagellm.server.guard import REQUEST_ID, Guard
from sagellm.server.streams import unless_gone

TRACE_ID = "x-trace-id"
OBJECTIVES = {
    "x-slo-deadline-ms": ("slo_deadline_ms", float),
    "x-tbt-slo-ms": ("tbt_slo_ms", float),
    "x-cost-budget": ("cost_budget", float),
    "x-priority": ("priority", str),
    "x-preferred-engine": ("preferred_instance_id", str),
}
"""Header of a request -> field of its `RequestMetadata`."""

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


class _Relayed(StreamingResponse):
    """A stream that ends at its engine when the client goes away, and not when memory is next tidied."""

    def __init__(self, reply: Reply, headers: dict[str, str]):
        super().__init__(reply.pieces, reply.status, headers)
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._reply.aclose()


def _openai(app: FastAPI, manager: ControlPlaneManager) -> None:
    async def relay(request: Request) -> Response:
        call = await _call(request)
        try:
            reply = await unless_gone(request, manager.submit(call))
        except (NoEngine, QueueFull, EngineLost) as error:
            return _no_answer(error, manager.retry_after(call))
        headers = dict(reply.headers)
        if headers.get("content-type", "").startswith("text/event-stream"):
            return _Relayed(reply, headers)
        return Response(await reply.read(), reply.status, headers)

    for path in KINDS:
        app.add_api_route(
            path, relay, methods=["POST"], response_model=None, summary="To one of the engines."
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


async def _call(request: Request) -> Call:
    body = await request.json()
    if not isinstance(body, dict):
        raise APIError(400, "the body is no JSON object; accepted: an object")
    for name, kinds in (("model", (str, type(None))), ("stream", (bool, type(None)))):
        if not isinstance(body.get(name), kinds):
            raise APIError(400, f"{name} is {body[name]!r}; accepted: {kinds[0].__name__}", param=name)
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    given: dict[str, Any] = {
        "request_type": KINDS[request.url.path],
        "model_name": body.get("model"),
        "max_tokens": most if isinstance(most, int) and most > 0 else None,
        "user_id": body.get("user") if isinstance(body.get("user"), str) else None,
    }
    for header, (name, read) in OBJECTIVES.items():
        if (text := request.headers.get(header)) is not None:
            try:
                given[name] = read(text)
            except ValueError:
                raise APIError(400, f"{header} is {text!r}; accepted: a number", param=header) from None
    metadata = RequestMetadata(**given)
    name = request.headers.get(REQUEST_ID) or metadata.request_id
    headers = {REQUEST_ID: name}
    if (trace := request.headers.get(TRACE_ID)) is not None:
        headers[TRACE_ID] = trace
    return Call(request.url.path, body, metadata, headers)


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
