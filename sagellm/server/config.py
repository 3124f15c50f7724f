"""A server's settings, beside those of its engine."""

from __future__ import annotations

from attrs import field, frozen
from attrs.validators import optional

from sagellm import checks
from sagellm.ports import SagePorts, port
from sagellm.server.parsing import FORMS

LOOPBACK = "127.0.0.1"


@frozen(kw_only=True)
class ServerConfig:
    """Where a server listens, whom it answers, and what it bears."""

    host: str = field(default=LOOPBACK, validator=checks.text)
    port: int = field(default=SagePorts().serve, validator=port(0))
    """0 takes one that is free."""
    api_keys: tuple[str, ...] = field(default=(), validator=checks.each(tuple, checks.text))
    """Any of them opens every route; without keys all are open."""
    served_model_name: str | None = field(default=None, validator=optional(checks.text))
    """What clients call the model; None takes the engine's name for it."""
    tool_call_parser: str | None = field(default=None, validator=optional(checks.one_of(FORMS)))
    """How the model marks calls of tools; None goes by its chat template."""
    debug_routes: bool = field(default=False, validator=checks.flag)
    """Whether there are routes that explain the last steps, `/debug`."""
    max_body_bytes: int = field(default=8 * 2**20, validator=checks.whole())
    """Of a request; larger ones get 413."""
    drain_seconds: float = field(default=30.0, validator=checks.number(0))
    """How long open streams may go on when the server is told to stop."""
