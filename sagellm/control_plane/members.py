"""One engine of a control plane, with all that is known of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from attrs import define, field

from sagellm.control_plane.endpoint import Endpoint
from sagellm.control_plane.face import features_of
from sagellm.control_plane.faults import Breaker, Lost, Progress
from sagellm.control_plane.types import EngineInfo
from sagellm.control_plane.waiting import Pace
from sagellm.engine.base import BaseInferenceEngine
from sagellm.engine.stats import EngineLoad
from sagellm.errors import UserError


@define(eq=False)
class Member:
    """An engine of this control plane."""

    info: EngineInfo
    engine: BaseInferenceEngine
    endpoint: Endpoint
    api_key: str | None = field(default=None, repr=False)
    """That its server wants; no answer, decision or line of a log shows it."""
    ours: bool = False
    """It was started here, and is stopped here."""
    starting: asyncio.Task | None = None
    """An object's `start`."""
    start_error: str = ""
    breaker: Breaker = field(factory=Breaker)
    lost: Lost = field(factory=Lost)
    """Set when it does not answer any more: what is open there is given up."""
    idle: asyncio.Event = field(factory=asyncio.Event)
    """Set while no request of ours is there."""
    ready: asyncio.Event = field(factory=asyncio.Event)
    pace: Pace = field(factory=Pace)
    progress: Progress = field(factory=Progress)
    probing: asyncio.Task | None = None
    telling: asyncio.Task | None = None
    """How busy it is; it may take longer to say so than a probe waits."""
    load: EngineLoad = field(factory=EngineLoad)
    """As it told last."""
    detail: str = ""
    """Why it is not ready."""
    draining: bool = False
    """It was told to here, and does not know."""
    gone: bool = False
    """It was unregistered; another may have its id."""

    @property
    def made(self) -> bool:
        """Its object was made here, of an address, and ends when it is forgotten."""
        return self.info.host is not None

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


def check_facts(facts: Mapping[str, Any]) -> None:
    """What routing goes by must be what it says, and what is ours to say is not said. Raises UserError."""
    if own := facts.keys() & {"started", "pid"}:
        raise UserError(
            f"metadata.{min(own)} is given; accepted: without it, as it is of engines started here"
        )
    if "api_key" in facts:
        raise UserError("metadata.api_key is given; accepted: api_key beside metadata, which answers show")
    for name, least in (("max_concurrent", 1), ("tensor_parallel", 1), ("cost_per_token", 0)):
        value = facts.get(name)
        kinds = int if least else (int, float)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds) or value < least):
            raise UserError(f"metadata.{name} is {value!r}; accepted: a number of at least {least}")
    if not isinstance(facts.get("labels") or {}, Mapping):
        raise UserError(f"metadata.labels is {facts['labels']!r}; accepted: names with values")


def check_key(key: str | None) -> None:
    """Raises UserError for what no header can hold; the key itself is not repeated."""
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise UserError("api_key is empty, or has blanks or letters beyond ASCII; accepted: a key without")
