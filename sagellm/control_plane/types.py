"""What is known of an engine and of a request, with the names that SAGE's control planes use."""

from __future__ import annotations

import time
import uuid
from enum import Enum, IntEnum
from typing import Any

from attrs import asdict, define, field

from sagellm import checks
from sagellm.engine.base import EngineState
from sagellm.errors import UserError, unknown


class RequestType(Enum):
    LLM_CHAT = "llm_chat"
    LLM_GENERATE = "llm_generate"
    EMBEDDING = "embedding"


class RequestPriority(IntEnum):
    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3
    BACKGROUND = 4


def _port(instance: object, attribute, value: object) -> None:
    if value is not None and (
        not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65535
    ):
        raise UserError(f"port is {value!r}; accepted: a port from 1 to 65535")


def _plain(instance: type, attribute, value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


@define(kw_only=True)
class EngineInfo:
    """An engine as the control plane sees it. Times are seconds since 1970."""

    engine_id: str = field(validator=checks.text)
    model_id: str
    """What clients call the model; empty until the engine has said which it serves, where nobody else did."""
    host: str | None = None
    """None, as the port is: an object in this process."""
    port: int | None = field(default=None, validator=_port)
    state: EngineState = EngineState.STARTING
    engine_kind: str = "llm"
    """sagellm, vllm, lmdeploy, chitu; `llm` or `embedding` where only its API is known, which is OpenAI's."""
    created_at: float = field(factory=time.time)
    last_heartbeat: float | None = None
    """When it last answered a probe."""
    consecutive_failures: int = 0
    active_requests: int = 0
    """Sent there by this control plane, and not ended."""
    metadata: dict[str, Any] = field(factory=dict)
    """Labels and facts: `device`, `max_concurrent`, `cost_per_token`, `started` (by this control plane), ..."""

    @property
    def is_healthy(self) -> bool:
        return self.state in (EngineState.READY, EngineState.DRAINING) and not self.consecutive_failures

    @property
    def is_accepting_requests(self) -> bool:
        return self.state is EngineState.READY

    @property
    def is_terminal(self) -> bool:
        return self.state is EngineState.STOPPED

    @property
    def address(self) -> str | None:
        """Where it listens; None for an object in this process."""
        if self.host is None:
            return None
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def to_dict(self) -> dict[str, Any]:
        shown = asdict(self, value_serializer=_plain)
        return shown | {
            "is_healthy": self.is_healthy,
            "is_accepting_requests": self.is_accepting_requests,
            "is_terminal": self.is_terminal,
        }


@define(kw_only=True)
class RequestMetadata:
    """A request and what is known of how it went. Times are seconds since 1970; None: not yet, or not asked."""

    request_id: str = field(factory=lambda: f"req-{uuid.uuid4().hex}")
    prompt: Any = None
    """A text, token ids, or, for `llm_chat`, messages."""
    user_id: str | None = None
    priority: RequestPriority = field(default=RequestPriority.NORMAL, converter=lambda p: _priority(p))
    slo_deadline_ms: float | None = None
    """From arrival to the first token."""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    model_name: str | None = None
    """None: whichever model there is, if there is one alone."""
    request_type: RequestType = field(
        default=RequestType.LLM_GENERATE, converter=lambda kind: _request_type(kind)
    )
    embedding_texts: list[str] | None = None
    embedding_model: str | None = None
    embedding_batch_size: int = 32
    """Texts that go to an engine at once."""
    arrival_time: float = field(factory=time.time)
    queue_time: float | None = None
    schedule_time: float | None = None
    start_time: float | None = None
    """Of the first piece of output."""
    end_time: float | None = None
    preferred_instance_id: str | None = None
    """An engine's id; it is taken if it can serve the request."""
    parallelism_hint: int | None = None
    """Ranks that the engine should have at least."""
    cost_budget: float | None = None
    """Most that may be paid, where engines say `cost_per_token`."""
    billing_tier: str = "standard"
    tokens_generated: int = 0
    last_token_time: float | None = None
    tbt_slo_ms: float | None = None
    """Between two tokens."""
    prefill_completed: bool = False
    can_be_preempted: bool = True
    """Whether it may go on in another engine when its own is lost."""
    tags: dict[str, str] = field(factory=dict)
    """Engines must have these labels."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self, value_serializer=_plain)


def _priority(value: Any) -> RequestPriority:
    try:
        return RequestPriority[value.upper()] if isinstance(value, str) else RequestPriority(value)
    except (KeyError, ValueError):
        raise unknown("priority", value, [p.name.lower() for p in RequestPriority]) from None


def _request_type(value: Any) -> RequestType:
    try:
        return RequestType(value)
    except ValueError:
        raise unknown("request type", value, [t.value for t in RequestType]) from None
