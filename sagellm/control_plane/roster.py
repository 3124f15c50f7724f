"""The engines that there are: they are registered, started, drained, stopped and found again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sagellm.control_plane import adapters
from sagellm.control_plane.adapters.base import EngineOptions, ServerAdapter
from sagellm.control_plane.config import ControlPlaneConfig
from sagellm.control_plane.endpoint import Endpoint
from sagellm.control_plane.face import endpoint_of
from sagellm.control_plane.launch import Launcher, LocalLauncher
from sagellm.control_plane.members import Member, check_facts, check_key
from sagellm.control_plane.registry import Registry
from sagellm.control_plane.remote import RemoteEngine
from sagellm.control_plane.routing.fleet import Fleet
from sagellm.control_plane.starting import spawn
from sagellm.control_plane.types import EngineInfo
from sagellm.control_plane.waiting import WaitingRoom
from sagellm.control_plane.watch import Watch
from sagellm.engine.base import BaseInferenceEngine, EngineState, Health
from sagellm.errors import UserError, unknown

log = logging.getLogger(__name__)


class Roster:
    """What a `ControlPlaneManager` does with its engines; requests are the manager's own matter."""

    def __init__(
        self,
        config: ControlPlaneConfig | None = None,
        *,
        launcher: Launcher | None = None,
        clock: Callable[[], float] = time.monotonic,
        **settings: Any,
    ):
        """`settings` are fields of `ControlPlaneConfig`, in its place. Raises UserError for a registry that cannot be
        read."""
        if config is not None and settings:
            raise UserError(f"config and {next(iter(settings))} are both given; accepted: one of them")
        self.config = config or ControlPlaneConfig(**settings)
        self.launcher = launcher or LocalLauncher()
        self.clock = clock
        self.fleet = Fleet()
        self.waiting = WaitingRoom(self.config.queue, self.config.queue_for)
        self.members: dict[str, Member] = {}
        self.watch = Watch(self.config, self.fleet, self.waiting, clock)
        self._registry = Registry(self.config.registry)
        keys = self._registry.keys()
        self._kept = [(EngineInfo(**row), keys.get(row["engine_id"])) for row in self._registry.read()]
        """Engines of before, with their keys, until `start`."""
        self._closing: set[asyncio.Task] = set()
        self._starting = asyncio.Lock()
        self._running = False

    # its life

    async def start(self) -> None:
        """Probe the engines from now on; those of the registry too."""
        if self._running:
            return
        early = bool(self.members)
        kept, self._kept = self._kept, []
        for info, api_key in kept:
            if info.engine_id not in self.members:
                self._readopt(info, api_key)
        self._running = True
        if early:
            self._keep()
        for member in self.members.values():
            self._begin(member)

    def _readopt(self, info: EngineInfo, api_key: str | None) -> None:
        """An engine of before: attached to again; one that this control plane had started can be stopped again."""
        assert info.address is not None
        member = self._attach(info, api_key)
        if isinstance(member.engine, ServerAdapter) and (pid := info.metadata.get("pid")):
            member.engine.adopt(self.launcher, int(pid), info.port, self._log(info.engine_id))

    async def stop(self, drain_s: float = 30) -> None:
        """End: requests may go on for so long; engines that were started here end, others go on."""
        ours = [m.info.engine_id for m in self.members.values() if m.ours]
        stops = (self.stop_engine_gracefully(name, drain_s) for name in ours)
        for name, error in zip(ours, await asyncio.gather(*stops, return_exceptions=True)):
            if isinstance(error, Exception):  # the others end all the same
                log.error("%s did not stop", name, exc_info=error)
        for member in self.members.values():
            self.watch.end(member)
            if member.made:
                await member.endpoint.aclose()
        self._running = False
        await asyncio.gather(*self._closing)

    # engines come

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

        It need not run yet: it is STARTING until it answers, and READY from then on. An object whose `start` nobody
        has called, which its state STARTING says, is started here, and stopped with this control plane or by
        `stop_engine_gracefully`; one that runs already is only used, as is whatever listens at an address.

        `api_key`: that the server at the address wants. With a registry it is kept there, see `Registry`.
        """
        self._refuse_known(engine_id)
        facts = dict(metadata or {})
        check_facts(facts)
        check_key(api_key)
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
        elif api_key is not None:
            raise UserError("api_key is given with an engine object; accepted: with an address")
        else:
            engine, through = model_id, endpoint_of(model_id)
            kind = getattr(engine, "KIND", "sagellm")
            info = EngineInfo(engine_id=engine_id, model_id=engine.model_id, engine_kind=kind, metadata=facts)
            member = self._add(info, engine, through)
        self._keep()
        return member.info

    def _refuse_known(self, engine_id: str) -> None:
        if engine_id in self.members:
            raise UserError(f"engine id {engine_id!r} is in use; accepted: a new one")

    def _attach(self, info: EngineInfo, api_key: str | None) -> Member:
        kinds = (*adapters.ADAPTERS, *adapters.OPENAI)
        if info.engine_kind not in kinds:
            raise unknown("engine kind", info.engine_kind, kinds)
        make: type[RemoteEngine] = RemoteEngine
        if info.engine_kind in adapters.ADAPTERS:
            make = adapters.adapter(info.engine_kind)
        assert info.address is not None
        engine = make(info.address, info.model_id, engine_id=info.engine_id, api_key=api_key)
        return self._add(info, engine, engine.endpoint, api_key)

    def _add(
        self, info: EngineInfo, engine: BaseInferenceEngine, endpoint: Endpoint, api_key: str | None = None
    ) -> Member:
        member = Member(info, engine, endpoint, api_key, ours=bool(info.metadata.get("started")))
        member.idle.set()
        self.members[info.engine_id] = member
        self.watch.describe(member)
        if self._running:
            self._begin(member)
        return member

    def _begin(self, member: Member) -> None:
        if not member.made and member.engine.state is EngineState.STARTING:
            member.ours = True
            member.starting = asyncio.create_task(self._start_object(member))
        self.watch.begin(member)

    async def _start_object(self, member: Member) -> None:
        try:
            await member.engine.start()
        except Exception as error:  # whatever a stranger's raises, it is told where one asks for the engine
            log.warning("%s did not start", member.info.engine_id, exc_info=error)
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            member.ours, member.start_error = False, f"{kind}{error}"
        else:  # `start` returns when it is ready, or at once where somebody else is at it
            member.ours = member.engine.state is EngineState.READY

    def _keep(self) -> None:
        """Write the registry, once it was read: before that, engines of before would be forgotten."""
        if self._running:
            keys = {name: m.api_key for name, m in self.members.items() if m.api_key is not None}
            self._registry.write((member.info for member in self.members.values()), keys)

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
        adapters.adapter(engine_kind)
        asked = EngineOptions(model=model, **options)
        async with self._starting:  # ids are chosen before the process is there
            name = engine_id or self._free_id(engine_kind)
            self._refuse_known(name)
            info, engine = await spawn(
                self.launcher,
                engine_kind,
                asked,
                engine_id=name,
                port=port,
                metadata=metadata or {},
                log=self._log(name),
            )
            self._add(info, engine, engine.endpoint)
            self._keep()
        return info

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

    async def wait_until_ready(self, engine_id: str, timeout: float = 600) -> EngineInfo:
        """Raises UserError where it ends, or is not ready in time."""
        member = self._member(engine_id)
        engine, limit = member.engine, self.clock() + timeout
        while member.info.state is not EngineState.READY:
            why = await engine.ended() if isinstance(engine, ServerAdapter) else ""
            if why := why or member.start_error:
                self.unregister_engine(engine_id)
                raise UserError(why)
            if self.clock() > limit:
                raise UserError(f"{engine_id} is not ready after {timeout:g} s: {member.detail}")
            with suppress(TimeoutError):
                await asyncio.wait_for(member.ready.wait(), 0.2)
        return member.info

    # engines go

    def unregister_engine(self, engine_id: str) -> EngineInfo:
        """Forget it; what is open there goes on elsewhere where it can. The engine itself goes on."""
        member = self._member(engine_id)
        del self.members[engine_id]
        self.fleet.remove(engine_id)
        self.watch.end(member)
        if member.starting is not None:
            member.starting.cancel()
        member.info.state, member.gone = EngineState.STOPPED, True
        member.lost.set()
        if member.made and self._running:
            closing = asyncio.create_task(member.endpoint.aclose())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        self._keep()
        return member.info

    async def start_engine_drain(self, engine_id: str) -> EngineInfo:
        """Send it nothing new."""
        member = self._member(engine_id)
        member.draining = True
        self.watch.enter(member, EngineState.DRAINING)
        return member.info

    async def stop_engine_gracefully(self, engine_id: str, drain_s: float = 30) -> EngineInfo:
        """Drain it, end it where it was started here, and forget it."""
        member = self._member(engine_id)
        await self.start_engine_drain(engine_id)
        with suppress(TimeoutError):
            await asyncio.wait_for(member.idle.wait(), drain_s)
        try:
            if member.ours:
                await self._stop_engine(member, drain_s)
        finally:
            if not member.gone:
                self.unregister_engine(engine_id)
        return member.info

    async def _stop_engine(self, member: Member, drain_s: float) -> None:
        if member.starting is not None:
            member.starting.cancel()
            await asyncio.wait([member.starting])
        await member.engine.stop(drain_s)

    async def request_engine_shutdown(self, engine_id: str, drain_s: float = 30) -> EngineInfo:
        return await self.stop_engine_gracefully(engine_id, drain_s)

    def prune(self) -> list[str]:
        """Forget the engines that are lost; their ids."""
        lost = [name for name, m in self.members.items() if m.info.state is EngineState.ERROR]
        for name in lost:
            self.unregister_engine(name)
        return lost

    # how they are

    def record_engine_heartbeat(self, engine_id: str) -> None:
        """An engine says by itself that it is well."""
        self.watch.answered(self._member(engine_id), Health(EngineState.READY))

    def record_engine_failure(self, engine_id: str, detail: str = "reported") -> None:
        self.watch.answered(self._member(engine_id), Health(EngineState.ERROR, detail))

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

    async def engine_log(self, engine_id: str, lines: int = 100) -> list[str]:
        """The last that a started engine said."""
        engine = self._member(engine_id).engine
        if not isinstance(engine, ServerAdapter) or engine.process is None:
            raise UserError(f"{engine_id!r} was not started here; accepted: an engine that was")
        return await engine.process.tail(lines)
