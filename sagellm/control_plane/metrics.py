"""The control plane's statistics in Prometheus' text form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sagellm.engine.base import EngineState

if TYPE_CHECKING:
    from sagellm.control_plane.manager import ControlPlaneManager

PREFIX = "sagellm_control_plane_"


class _Snapshot(Collector):
    def __init__(self, manager: ControlPlaneManager):
        self._manager = manager

    def collect(self) -> Iterator[Metric]:
        members = self._manager.members.values()
        by_state = Counter(m.info.state for m in members)
        family = GaugeMetricFamily(f"{PREFIX}engines", "Engines by state.", labels=["state"])
        for state in EngineState:
            family.add_metric([state.value], by_state[state])
        yield family
        family = GaugeMetricFamily(f"{PREFIX}active_requests", "At an engine now.", labels=["engine"])
        for member in members:
            family.add_metric([member.info.engine_id], member.info.active_requests)
        yield family
        waiting = len(self._manager.waiting)
        yield GaugeMetricFamily(f"{PREFIX}waiting_requests", "While every engine is full.", value=waiting)
        family = CounterMetricFamily(
            f"{PREFIX}requests", "Sent to an engine and ended there.", labels=["engine", "outcome"]
        )
        for (engine, outcome), number in sorted(self._manager.outcomes.items()):
            family.add_metric([engine, outcome], number)
        yield family


def exposition(manager: ControlPlaneManager) -> str:
    registry = CollectorRegistry()
    registry.register(_Snapshot(manager))
    return generate_latest(registry).decode()
