"""`ControlPlaneManager`: the engines that there are, how they are, and where requests go."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from attrs import asdict, define, evolve, field, frozen
from attrs.validators import optional
from pydantic_core import from_json

from sagellm import checks
from sagellm.control_plane import adapters
from sagellm.control_plane.adapters.base import EngineOptions, ServerAdapter
from sagellm.control_plane.calls import Call, call_of
from sagellm.control_plane.endpoint import Endpoint, EngineLost, Reply
from sagellm.control_plane.face import endpoint_of, features_of
from sagellm.control_plane.faults import Breaker, RetryBudget
from sagellm.control_plane.features import ROUTES
from sagellm.control_plane.launch import Launcher, LocalLauncher
from sagellm.control_plane.registry import Registry
from sagellm.control_plane.relay import Outcome, Relay
from sagellm.control_plane.remote import RemoteEngine, as_error
from sagellm.control_plane.routing.decision import Decision, NoEngine, Router
from sagellm.control_plane.routing.fleet import Fleet
from sagellm.control_plane.types import EngineInfo, RequestMetadata
from sagellm.control_plane.waiting import WaitingRoom
from sagellm.engine.base import BaseInferenceEngine, EngineState, Health
from sagellm.engine.stats import EngineLoad
from sagellm.errors import UserError, unknown

log = logging.getLogger(__name__)

LOST_AFTER = 3
"""Probes in a row that nobody answers, after which an engine counts as lost."""
KEPT_REQUESTS = 1000


@frozen(kw_only=True)
class ControlPlaneConfig:
    """How a control plane chooses, waits, and gives up. Times are seconds."""

    strategy: str = field(default="composite", validator=checks.text)
    seed: int = field(default=0, validator=checks.whole(0))
    registry: Path | None = None
    """File in which engines are kept; None keeps none."""
    logs: Path | None = None
    """Folder for what started engines say; None: beside the registry, or the current folder."""
    probe_every: float = field(default=1.0, validator=checks.number(above=0))
    stall: float = field(default=60.0, validator=checks.number(above=0))
    """A stream that says nothing for so long goes on elsewhere."""
    attempts: int = field(default=3, validator=checks.whole())
    """Engines that a request without output is sent to, at most."""
    queue: int = field(default=1024, validator=checks.whole(0))
    """Requests that wait while every engine is full; more are refused."""
    queue_for: float = field(default=60.0, validator=checks.number(above=0))
    max_concurrent: int | None = field(default=None, validator=optional(checks.whole()))
    """Requests at one engine that does not say how many it takes; None: as many as come."""
    decisions: int = field(default=1000, validator=checks.whole(0))
    """That are kept to be explained."""


@define(eq=False)
class Member:
    """An engine of this control plane."""

    info: EngineInfo
    engine: BaseInferenceEngine
    endpoint: Endpoint
    breaker: Breaker = field(factory=Breaker)
    lost: asyncio.Event = field(factory=asyncio.Event)
    """Set when it does not answer any more: what is open there is given up."""
    idle: asyncio.Event = field(factory=asyncio.Event)
    """Set while no request of ours is there."""
    ready: asyncio.Event = field(factory=asyncio.Event)
    probing: asyncio.Task | None = None
    load: EngineLoad = field(factory=EngineLoad)
    """As it told last."""
    detail: str = ""
    """Why it is not ready."""

    @property
    def features(self) -> frozenset[str]:
        """Of requests that it can serve, as far as it is known now."""
        if self.info.engine_kind == "embedding":
            return frozenset({"embeddings"})
        return features_of(self.engine)

    @property
    def longest(self) -> int | None:
        with suppress(UserError):
            return self.engine.get_capability().max_sequence_length
        return None


class ControlPlaneManager:
    """Engines come and go by `register_engine` and `unregister_engine`, at any time and in any state.

    Requests are OpenAI's (`submit`, `call_of`), or `RequestMetadata` as SAGE has them (`submit_request`). All but
    `register_engine` and what only looks is of one event loop, in which `start` begins to probe.
    """

    def __init__(
        self,
        config: ControlPlaneConfig | None = None,
        *,
        launcher: Launcher | None = None,
        clock: Callable[[], float] = time.monotonic,
        **settings: Any,
    ):
        if config is not None and settings:
            raise UserError(f"config and {next(iter(settings))} are both given; accepted: one of them")
        self.config = config or ControlPlaneConfig(**settings)
        self.launcher = launcher or LocalLauncher()
        self.clock = clock
        self.fleet = Fleet()
        self.router = Router(
            self.fleet, self.config.strategy, seed=self.config.seed, keep=self.config.decisions
        )
        self.members: dict[str, Member] = {}
        self.waiting = WaitingRoom(self.config.queue, self.config.queue_for)
        self.retries = RetryBudget()
        self.requests: dict[str, RequestMetadata] = {}
        """The last ones, by id."""
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """(engine, outcome) -> requests."""
        self._open: dict[str, asyncio.Task] = {}
        self._registry = Registry(self.config.registry)
        self._closing: set[asyncio.Task] = set()
        self._starting = asyncio.Lock()
        self._running = False
        self._relay = Relay(self)

    # its life

    async def start(self) -> None:
        """Probe the engines from now on; those of the registry too."""
        if self._running:
            return
        self._running = True
        for row in self._registry.read():
            if row["engine_id"] not in self.members:
                await self._readopt(EngineInfo(**row))
        for member in self.members.values():
            self._probe(member)

    async def _readopt(self, info: EngineInfo) -> None:
        """An engine of before: attached to again; one that this control plane had started can be stopped again."""
        assert info.address is not None
        member = self._attach(info, info.metadata.get("api_key"))
        if isinstance(member.engine, ServerAdapter) and (pid := info.metadata.get("pid")):
            member.engine.adopt(self.launcher, int(pid), info.port, self._log(info.engine_id))

    async def stop(self, drain_s: float = 30) -> None:
        """End: requests may go on for so long; engines that were started here end, others go on."""
        started = [m for m in self.members.values() if m.info.metadata.get("started")]
        await asyncio.gather(*(self.stop_engine_gracefully(m.info.engine_id, drain_s) for m in started))
        for member in self.members.values():
            if member.probing is not None:
                member.probing.cancel()
            if isinstance(member.engine, RemoteEngine):
                await member.engine.endpoint.aclose()
        self._running = False
        await asyncio.gather(*self._closing)

    # who is there

    def register_engine(
        self,
        engine_id: str,
        model_id: str | BaseInferenceEngine,
        host: str | None = None,
        port: int | None = None,
        engine_kind: str = "llm",
        metadata: Mapping[str, Any] | None = None,
        *,
        api_key: str | None = None,
    ) -> EngineInfo:
        """`register_engine("sagellm", engine)` takes an engine in this process; the long form one at an address.

        It need not run yet: it is STARTING until it answers, and READY from then on.
        """
        if engine_id in self.members:
            raise UserError(f"engine id {engine_id!r} is in use; accepted: a new one")
        facts = dict(metadata or {})
        _check_facts(facts)
        if isinstance(model_id, str):
            if host is None or port is None:
                raise UserError("host and port are missing; accepted: both, or an engine object")
            info = EngineInfo(
                engine_id=engine_id,
                model_id=model_id,
                host=host,
                port=port,
                engine_kind=engine_kind,
                metadata=facts,
            )
            member = self._attach(info, api_key)
        else:
            engine, through = model_id, endpoint_of(model_id)
            kind = getattr(engine, "KIND", "sagellm")
            info = EngineInfo(engine_id=engine_id, model_id=engine.model_id, engine_kind=kind, metadata=facts)
            member = self._add(info, engine, through)
        self._registry.write(m.info for m in self.members.values())
        return member.info

    def _attach(self, info: EngineInfo, api_key: str | None) -> Member:
        kinds = (*adapters.ADAPTERS, *adapters.OPENAI)
        if info.engine_kind not in kinds:
            raise unknown("engine kind", info.engine_kind, kinds)
        make: type[RemoteEngine] = RemoteEngine
        if info.engine_kind in adapters.ADAPTERS:
            make = adapters.adapter(info.engine_kind)
        assert info.address is not None
        engine = make(info.address, info.model_id, engine_id=info.engine_id, api_key=api_key)
        return self._add(info, engine, engine.endpoint)

    def _add(self, info: EngineInfo, engine: BaseInferenceEngine, endpoint: Endpoint) -> Member:
        member = Member(info, engine, endpoint)
        member.idle.set()
        self.members[info.engine_id] = member
        self._describe(member)
        if self._running:
            self._probe(member)
        return member

    def _describe(self, member: Member) -> None:
        """Tell the fleet what the engine can do, as far as it is known."""
        info, facts = member.info, member.info.metadata
        capability = None
        with suppress(UserError):
            capability = member.engine.get_capability()
        if info.engine_id in self.fleet:
            self.fleet.remove(info.engine_id)
        device = facts.get("device") or (capability.backend if capability else "unknown")
        self.fleet.add(
            info.engine_id,
            kind=info.engine_kind,
            model_id=info.model_id,
            device=str(device),
            features=member.features,
            max_length=capability.max_sequence_length if capability else None,
            max_concurrent=facts.get("max_concurrent") or self.config.max_concurrent,
            cost_per_token=facts.get("cost_per_token"),
            labels={str(name): str(value) for name, value in (facts.get("labels") or {}).items()},
            ranks=facts.get("tensor_parallel") or 1,
            kv_tokens=capability.kv_cache_capacity if capability else None,
        )
        self._tell_state(member)

    def _tell_state(self, member: Member) -> None:
        accepting = member.info.is_accepting_requests and member.breaker.allows(self.clock())
        self.fleet.set_state(member.info.engine_id, accepting)
        if accepting:
            self.waiting.wake(member.info.model_id)

    def unregister_engine(self, engine_id: str) -> EngineInfo:
        """Forget it; what is open there goes on elsewhere where it can. The engine itself goes on."""
        member = self._member(engine_id)
        del self.members[engine_id]
        self.fleet.remove(engine_id)
        if member.probing is not None:
            member.probing.cancel()
        member.info.state = EngineState.STOPPED
        member.lost.set()
        if isinstance(member.engine, RemoteEngine) and self._running:
            closing = asyncio.create_task(member.engine.endpoint.aclose())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        self._registry.write(m.info for m in self.members.values())
        return member.info

    def _member(self, engine_id: str) -> Member:
        if engine_id not in self.members:
            raise unknown("engine", engine_id, self.members)
        return self.members[engine_id]

    def get_engine_info(self, engine_id: str) -> EngineInfo:
        return self._member(engine_id).info

    def get_engine_state(self, engine_id: str) -> EngineState:
        return self._member(engine_id).info.state

    def list_registered_engines(self) -> list[EngineInfo]:
        return [member.info for member in self.members.values()]

    def prune(self) -> list[str]:
        """Forget the engines that are lost; their ids."""
        lost = [name for name, m in self.members.items() if m.info.state is EngineState.ERROR]
        for name in lost:
            self.unregister_engine(name)
        return lost

    # how they are

    def record_engine_heartbeat(self, engine_id: str) -> None:
        """An engine says by itself that it is well."""
        self._answered(self._member(engine_id), Health(EngineState.READY))

    def record_engine_failure(self, engine_id: str, detail: str = "reported") -> None:
        self._answered(self._member(engine_id), Health(EngineState.ERROR, detail))

    def _probe(self, member: Member) -> None:
        if member.probing is None:
            member.probing = asyncio.create_task(self._probes(member))

    async def _probes(self, member: Member) -> None:
        while True:
            try:
                await self.probe(member)
            except Exception as error:  # whatever a stranger's server answers, it is asked again
                log.exception("the probe of %s failed", member.info.engine_id)
                self._answered(member, Health(EngineState.ERROR, f"{type(error).__name__}: {error}"))
            await asyncio.sleep(self.config.probe_every)

    async def probe(self, member: Member) -> None:
        """Ask an engine how it is, and, where it is well, how busy."""
        engine = member.engine
        health = await engine.health()
        fresh = health.ready and member.info.state in (EngineState.STARTING, EngineState.ERROR)
        if fresh and isinstance(engine, RemoteEngine):
            try:
                await engine.discover()
            except (EngineLost, UserError) as error:
                health = Health(EngineState.ERROR, str(error))
            else:
                member.info.model_id = engine.model_id
                if member.info.engine_kind == RemoteEngine.KIND:
                    member.info.engine_kind = engine.kind
                self._describe(member)
        self._answered(member, health)
        if health.ready:
            with suppress(EngineLost, UserError):
                member.load = await _load(engine)
                self.fleet.set_load(member.info.engine_id, member.load)

    def _answered(self, member: Member, health: Health) -> None:
        info = member.info
        member.detail = health.detail
        if health.state is EngineState.ERROR:
            info.consecutive_failures += 1
            if info.consecutive_failures >= LOST_AFTER or not isinstance(member.engine, RemoteEngine):
                self._enter(member, EngineState.ERROR)
            return
        info.consecutive_failures = 0
        info.last_heartbeat = time.time()
        if info.state is EngineState.DRAINING and health.ready:
            return  # it was told to drain here, and does not know
        self._enter(member, health.state)

    def _enter(self, member: Member, state: EngineState) -> None:
        before, member.info.state = member.info.state, state
        if state is EngineState.ERROR and before is not state:
            member.lost.set()
        elif state is EngineState.READY and before is not state:
            member.lost.clear()
            member.breaker = Breaker()
            member.ready.set()
        if state is not EngineState.READY:
            member.ready.clear()
        self._tell_state(member)

    async def start_engine_drain(self, engine_id: str) -> EngineInfo:
        """Send it nothing new."""
        member = self._member(engine_id)
        self._enter(member, EngineState.DRAINING)
        return member.info

    async def stop_engine_gracefully(self, engine_id: str, drain_s: float = 30) -> EngineInfo:
        """Drain it, end it where it was started here, and forget it."""
        member = self._member(engine_id)
        await self.start_engine_drain(engine_id)
        with suppress(TimeoutError):
            await asyncio.wait_for(member.idle.wait(), drain_s)
        if member.info.metadata.get("started"):
            await member.engine.stop(drain_s)
        if engine_id in self.members:
            self.unregister_engine(engine_id)
        return member.info

    # engines that are started here

    async def request_engine_startup(
        self,
        model: str,
        engine_kind: str = "sagellm",
        engine_id: str | None = None,
        port: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> EngineInfo:
        """Start a server and register it; it is STARTING when this returns. Options are those of `EngineOptions`."""
        async with self._starting:  # ids are chosen before the process is there
            return await self._start_engine(model, engine_kind, engine_id, port, metadata or {}, options)

    async def _start_engine(
        self,
        model: str,
        engine_kind: str,
        engine_id: str | None,
        port: int | None,
        metadata: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> EngineInfo:
        make = adapters.adapter(engine_kind)
        asked = EngineOptions(model=model, **options)
        name = engine_id or self._free_id(engine_kind)
        if name in self.members:
            raise UserError(f"engine id {name!r} is in use; accepted: a new one")
        place = await self.launcher.place(asked.device, asked.tensor_parallel * asked.pipeline_parallel)
        engine = make.launched(
            evolve(asked, host=place.host),
            place,
            port or await place.free_port(),
            engine_id=name,
            log=self._log(name),
        )
        facts = {"started": True, "tensor_parallel": asked.tensor_parallel} | dict(metadata)
        if asked.max_concurrent is not None:
            facts["max_concurrent"] = asked.max_concurrent
        if asked.device is not None:
            facts["device"] = asked.device
        await engine.spawn()
        facts["pid"] = engine.process.pid if engine.process else None
        info = EngineInfo(
            engine_id=name,
            model_id=asked.served_model_name or model,
            host=place.host,
            port=engine.port,
            engine_kind=engine_kind,
            metadata=facts,
        )
        member = self._add(info, engine, engine.endpoint)
        self._registry.write(m.info for m in self.members.values())
        return member.info

    async def request_engine_shutdown(self, engine_id: str, drain_s: float = 30) -> EngineInfo:
        return await self.stop_engine_gracefully(engine_id, drain_s)

    def _free_id(self, kind: str) -> str:
        number = 1
        while (name := f"{kind}-{number}") in self.members:
            number += 1
        return name

    def _log(self, engine_id: str) -> Path:
        folder = self.config.logs
        if folder is None:
            folder = Path() if self.config.registry is None else self.config.registry.parent / "logs"
        return folder / f"{engine_id}.log"

    async def engine_log(self, engine_id: str, lines: int = 100) -> list[str]:
        """The last that a started engine said."""
        engine = self._member(engine_id).engine
        if not isinstance(engine, ServerAdapter) or engine.process is None:
            raise UserError(f"{engine_id!r} was not started here; accepted: an engine that was")
        return await engine.process.tail(lines)

    async def wait_until_ready(self, engine_id: str, timeout: float = 600) -> EngineInfo:
        """Raises UserError where it ends, or is not ready in time."""
        member = self._member(engine_id)
        limit = self.clock() + timeout
        while member.info.state is not EngineState.READY:
            engine = member.engine
            if isinstance(engine, ServerAdapter) and (why := await engine.ended()):
                self.unregister_engine(engine_id)
                raise UserError(why)
            if self.clock() > limit:
                raise UserError(f"{engine_id} is not ready after {timeout:g} s: {member.detail}")
            with suppress(TimeoutError):
                await asyncio.wait_for(member.ready.wait(), 0.2)
        return member.info

    # requests

    async def place(self, call: Call, excluded: Sequence[str] = ()) -> tuple[Member, Decision]:
        """The engine for a request; waits while all that could serve it are full. Raises NoEngine or QueueFull."""
        waited = False
        while True:
            if waited or not self.waiting.ahead(call.ask):
                try:
                    decision = self.router.choose(call.ask, excluded)
                except NoEngine as error:
                    if error.kind != "full":
                        raise
                else:
                    return self.members[decision.chosen], decision
            await self.waiting.wait(call.ask)
            waited = True

    def sent(self, member: Member, call: Call) -> None:
        """A request goes to an engine; `ended` follows."""
        info = member.info
        info.active_requests += 1
        member.idle.clear()
        member.breaker.sent()
        if info.engine_id in self.fleet:
            self.fleet.sent(info.engine_id, call.ask)
            if member.breaker.trying:
                self._tell_state(member)

    def first_token(self, member: Member, call: Call, seconds: float) -> None:
        if member.info.engine_id in self.fleet:
            self.fleet.first_token(member.info.engine_id, call.ask, seconds)

    def ended(self, member: Member, call: Call, outcome: Outcome, made: int, per_token: float | None) -> None:
        info = member.info
        info.active_requests -= 1
        if not info.active_requests:
            member.idle.set()
        if info.engine_id in self.fleet:
            if outcome is Outcome.ANSWERED:
                self.fleet.finished(info.engine_id, call.ask, made, per_token)
            else:
                self.fleet.failed(info.engine_id, call.ask)
        self.outcomes[info.engine_id, outcome.value] += 1
        if outcome is Outcome.FAILED:
            self._failed(member)
        else:
            tried = member.breaker.trying
            member.breaker.succeeded() if outcome is Outcome.ANSWERED else member.breaker.undecided()
            if tried:
                self._tell_state_if_here(member)
        self.waiting.wake(info.model_id)

    def _failed(self, member: Member) -> None:
        """A request failed there; after some in a row it gets none for a while."""
        pause = member.breaker.failed(self.clock())
        if pause is not None and member.info.engine_id in self.members:
            self._tell_state(member)
            asyncio.get_running_loop().call_later(pause, self._tell_state_if_here, member)

    def _tell_state_if_here(self, member: Member) -> None:
        if member.info.engine_id in self.members:
            self._tell_state(member)

    async def submit(self, call: Call) -> Reply:
        """An OpenAI request's answer, as an engine gave it. Raises NoEngine, QueueFull or EngineLost."""
        self._remember(call.metadata)
        return await self._relay.send(call)

    def _remember(self, metadata: RequestMetadata) -> None:
        self.requests[metadata.request_id] = metadata
        while len(self.requests) > KEPT_REQUESTS:
            del self.requests[next(iter(self.requests))]

    async def submit_request(self, request: RequestMetadata) -> dict[str, Any]:
        """A request as SAGE has it, and its OpenAI answer. Raises UserError for what engines refuse."""
        if request.request_id in self._open:
            raise UserError(f"request id {request.request_id!r} is in use; accepted: a new one")
        task = asyncio.create_task(self._answer(request))
        self._open[request.request_id] = task
        try:
            return await task
        except asyncio.CancelledError:
            if not task.cancelled() or (current := asyncio.current_task()) is None or current.cancelling():
                task.cancel()
                raise
            raise UserError(f"request {request.request_id!r} was cancelled") from None
        finally:
            del self._open[request.request_id]

    async def _answer(self, request: RequestMetadata) -> dict[str, Any]:
        reply = await self.submit(call_of(request))
        body = await reply.read()
        if reply.status != 200:
            raise as_error(reply.status, body)
        return from_json(body)

    async def cancel_request(self, request_id: str) -> bool:
        """End a request of `submit_request`, at its engine too; False where there is none of this id."""
        task = self._open.get(request_id)
        return task is not None and task.cancel()

    def get_request_status(self, request_id: str) -> dict[str, Any]:
        if request_id not in self.requests:
            raise UserError(f"unknown request {request_id!r}; accepted: one of the last {KEPT_REQUESTS}")
        metadata = self.requests[request_id]
        state = "finished" if metadata.end_time else "running" if metadata.start_time else "queued"
        return {"state": state} | metadata.to_dict()

    def get_cluster_status(self) -> dict[str, Any]:
        """Engines by state, with how busy they are."""
        engines = [
            member.info.to_dict() | {"detail": member.detail, "load": asdict(member.load)}
            for member in self.members.values()
        ]
        states = [engine["state"] for engine in engines]
        return {
            "strategy": self.router.strategy.name,
            "engines": engines,
            "states": {state: states.count(state) for state in sorted(set(states))},
            "waiting": len(self.waiting),
            "routes": list(ROUTES),
        }


def _check_facts(facts: Mapping[str, Any]) -> None:
    """What routing goes by must be what it says, and what is ours to say is not said. Raises UserError."""
    if own := facts.keys() & {"started", "pid"}:
        raise UserError(
            f"metadata.{min(own)} is given; accepted: without it, as it is of engines started here"
        )
    for name, least in (("max_concurrent", 1), ("tensor_parallel", 1), ("cost_per_token", 0)):
        value = facts.get(name)
        kinds = int if least else (int, float)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds) or value < least):
            raise UserError(f"metadata.{name} is {value!r}; accepted: a number of at least {least}")
    if not isinstance(facts.get("labels") or {}, Mapping):
        raise UserError(f"metadata.labels is {facts['labels']!r}; accepted: names with values")


async def _load(engine: BaseInferenceEngine) -> EngineLoad:
    if isinstance(engine, RemoteEngine):
        return await engine.refresh()
    return await asyncio.to_thread(engine.stats)
