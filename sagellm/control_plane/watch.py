"""How engines are: they are probed, and the fleet and those who wait hear what was found."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from sagellm.control_plane.config import ControlPlaneConfig
from sagellm.control_plane.endpoint import EngineLost
from sagellm.control_plane.faults import Breaker
from sagellm.control_plane.members import Member
from sagellm.control_plane.remote import PROBE_SECONDS, RemoteEngine
from sagellm.control_plane.routing.fleet import Fleet
from sagellm.control_plane.waiting import WaitingRoom
from sagellm.engine.base import EngineState, Health
from sagellm.engine.stats import EngineLoad
from sagellm.errors import UserError

log = logging.getLogger(__name__)

LOST_AFTER = 3
"""Probes in a row that nobody answers, after which an engine counts as lost."""
HEALTH_SECONDS = 10.0
"""That an engine has to say how it is; servers are asked with shorter limits of their own."""


class Watch:
    def __init__(
        self, config: ControlPlaneConfig, fleet: Fleet, waiting: WaitingRoom, clock: Callable[[], float]
    ):
        self._config, self._fleet, self._waiting, self._clock = config, fleet, waiting, clock

    def begin(self, member: Member) -> None:
        """Probe it from now on."""
        if member.probing is None:
            member.probing = asyncio.create_task(self._probes(member))

    def end(self, member: Member) -> None:
        for task in (member.probing, member.telling):
            if task is not None:
                task.cancel()
        member.probing = member.telling = None

    async def _probes(self, member: Member) -> None:
        while not member.gone:
            try:
                await self.probe(member)
            except Exception as error:  # whatever a stranger's server answers, it is asked again
                log.exception("the probe of %s failed", member.info.engine_id)
                self.answered(member, Health(EngineState.ERROR, f"{type(error).__name__}: {error}"))
            await asyncio.sleep(self._config.probe_every)

    async def probe(self, member: Member) -> None:
        """Ask an engine how it is, and, where it is well, how busy."""
        info, load = member.info, None
        health = await _health(member)
        if health.ready:
            load = await self._load(member)
            still = member.progress.still(load, info.active_requests, self._clock())
            if still > self._config.stall:
                self._stands_still(member, still)
                return
            if info.state in (EngineState.STARTING, EngineState.ERROR):
                health = await self._discover(member)
        elif member.start_error:
            health = Health(EngineState.ERROR, member.start_error)
        self.answered(member, health)
        if load is not None and not member.gone:
            member.load = load
            self._fleet.set_load(info.engine_id, load)

    def _stands_still(self, member: Member, seconds: float) -> None:
        """It says that it is well, and gets nowhere with what it has: that is given up, and nothing is sent there."""
        member.detail = f"it has requests and counted no token for {seconds:.3g} s"
        member.info.consecutive_failures += 1
        if member.info.state is not EngineState.ERROR:
            log.warning("%s: %s", member.info.engine_id, member.detail)
        self.enter(member, EngineState.ERROR)

    async def _discover(self, member: Member) -> Health:
        """What it serves and can do, as it is ready now and was not before."""
        info, engine = member.info, member.engine
        if isinstance(engine, RemoteEngine):
            try:
                await engine.discover()
            except (EngineLost, UserError) as error:
                return Health(EngineState.ERROR, str(error))
            if info.engine_kind == RemoteEngine.KIND:
                info.engine_kind = engine.kind
        info.model_id = engine.model_id
        self.describe(member)
        return Health(EngineState.READY)

    def answered(self, member: Member, health: Health) -> None:
        """An engine said how it is, or did not answer."""
        info = member.info
        member.detail = health.detail
        if health.state is EngineState.ERROR:
            info.consecutive_failures += 1
            if info.consecutive_failures >= LOST_AFTER or not isinstance(member.engine, RemoteEngine):
                self.enter(member, EngineState.ERROR)
            return
        info.consecutive_failures = 0
        info.last_heartbeat = time.time()
        self.enter(member, EngineState.DRAINING if health.ready and member.draining else health.state)

    def enter(self, member: Member, state: EngineState) -> None:
        before, member.info.state = member.info.state, state
        if state is EngineState.ERROR and before is not state:
            member.lost.set()
        elif state is EngineState.READY and before is not state:
            member.lost.clear()
            member.breaker = Breaker()
            member.ready.set()
        if state is not EngineState.READY:
            member.ready.clear()
        self.tell(member)

    def describe(self, member: Member) -> None:
        """Tell the fleet what the engine can do, as far as it is known."""
        info, facts = member.info, member.info.metadata
        capability = None
        with suppress(UserError):
            capability = member.engine.get_capability()
        if info.engine_id in self._fleet:
            self._fleet.remove(info.engine_id)
        device = facts.get("device") or (capability.backend if capability else "unknown")
        self._fleet.add(
            info.engine_id,
            kind=info.engine_kind,
            model_id=info.model_id,
            device=str(device),
            features=member.features,
            max_length=capability.max_sequence_length if capability else None,
            max_concurrent=facts.get("max_concurrent") or self._config.max_concurrent,
            cost_per_token=facts.get("cost_per_token"),
            labels={str(name): str(value) for name, value in (facts.get("labels") or {}).items()},
            ranks=facts.get("tensor_parallel") or 1,
            kv_tokens=capability.kv_cache_capacity if capability else None,
        )
        self.tell(member)

    def tell(self, member: Member) -> None:
        """Tell the fleet, and who waits, whether it takes requests now."""
        info = member.info
        if member.gone:
            return
        accepting = info.is_accepting_requests and member.breaker.allows(self._clock())
        self._fleet.set_state(info.engine_id, accepting)
        if accepting:
            self._waiting.wake(info.model_id)

    async def _load(self, member: Member) -> EngineLoad | None:
        """None: it does not tell now. An engine that is slow to tell, as in a long step, is not asked twice at once."""
        engine = member.engine
        if member.telling is None:
            asks = (
                engine.refresh(self._config.stall)
                if isinstance(engine, RemoteEngine)
                else asyncio.to_thread(engine.stats)
            )
            member.telling = asyncio.create_task(asks)
        done, _ = await asyncio.wait([member.telling], timeout=PROBE_SECONDS)
        if not done:
            return None
        told, member.telling = member.telling, None
        try:
            return told.result()
        except (EngineLost, UserError, TimeoutError):
            return None
        except Exception:  # it may be well all the same
            log.exception("what %s tells of its load cannot be read", member.info.engine_id)
            return None


async def _health(member: Member) -> Health:
    try:
        return await asyncio.wait_for(member.engine.health(), HEALTH_SECONDS)
    except TimeoutError:
        return Health(EngineState.ERROR, f"it did not say how it is within {HEALTH_SECONDS:g} s")
