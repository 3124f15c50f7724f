"""How a control plane chooses, waits, and gives up."""

from __future__ import annotations

from pathlib import Path

from attrs import field, frozen
from attrs.validators import optional

from sagellm import checks


@frozen(kw_only=True)
class ControlPlaneConfig:
    """Times are seconds."""

    strategy: str = field(default="composite", validator=checks.text)
    seed: int = field(default=0, validator=checks.whole(0))
    registry: Path | None = None
    """File in which engines are kept; None keeps none."""
    logs: Path | None = None
    """Folder for what started engines say; None: beside the registry, or the current folder."""
    probe_every: float = field(default=1.0, validator=checks.number(above=0))
    stall: float = field(default=60.0, validator=checks.number(above=0))
    """A stream that says nothing for so long goes on elsewhere; an engine that has requests, and counts no token for
    so long, is lost."""
    attempts: int = field(default=3, validator=checks.whole())
    """Engines that a request without output is sent to, at most."""
    queue: int = field(default=1024, validator=checks.whole(0))
    """Requests that wait while every engine is full; more are refused."""
    queue_for: float = field(default=60.0, validator=checks.number(above=0))
    max_concurrent: int | None = field(default=None, validator=optional(checks.whole()))
    """Requests at one engine that does not say how many it takes; None: as many as come."""
    decisions: int = field(default=1000, validator=checks.whole(0))
    """That are kept to be explained."""
