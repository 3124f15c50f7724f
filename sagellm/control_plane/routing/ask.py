"""A request as routing sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from sagellm.control_plane.features import needed
from sagellm.control_plane.routing.prefixes import read_prompt
from sagellm.control_plane.types import RequestMetadata, RequestPriority, RequestType

KINDS = {
    "/v1/chat/completions": RequestType.LLM_CHAT,
    "/v1/completions": RequestType.LLM_GENERATE,
    "/v1/embeddings": RequestType.EMBEDDING,
}


@frozen(kw_only=True)
class Ask:
    """What a request needs of an engine, and what it would like. None: no wish."""

    request_id: str
    model: str | None = None
    """None: whichever the fleet has, if it has one alone."""
    kind: RequestType = RequestType.LLM_GENERATE
    features: frozenset[str] = frozenset()
    """Of `features.py`; the route's own may be among them, but `kind` is what counts."""
    prompt_tokens: int = 1
    """Of text it is an estimate."""
    least_tokens: int | None = None
    """That the prompt surely has; None: as estimated. It counts where the estimate is too long for every engine."""
    max_tokens: int | None = None
    chunks: Sequence[int] = ()
    """Of `prefixes.chunks_of`."""
    deadline_ms: float | None = None
    """From now to the first token."""
    tbt_ms: float | None = None
    """Between two tokens."""
    priority: RequestPriority = RequestPriority.NORMAL
    """For those that keep requests waiting; no strategy goes by it."""
    cost_budget: float | None = None
    """Most that prompt and output may cost, where an engine has a price."""
    preferred: str | None = None
    """An engine's id; it is taken if it can serve the request now."""
    tags: Mapping[str, str] = {}
    """Labels that the engine must have."""
    ranks: int = 1
    """That the engine has at least."""


def ask_of(path: str, body: Mapping[str, Any], request: RequestMetadata) -> Ask:
    """From a request's route and body, and what came beside them."""
    prompt = read_prompt(path, body)
    return Ask(
        request_id=request.request_id,
        model=request.model_name,
        kind=KINDS.get(path, request.request_type),
        features=needed(path, body),
        prompt_tokens=prompt.tokens,
        least_tokens=prompt.least,
        max_tokens=request.max_tokens,
        chunks=prompt.chunks,
        deadline_ms=request.slo_deadline_ms,
        tbt_ms=request.tbt_slo_ms,
        priority=request.priority,
        cost_budget=request.cost_budget,
        preferred=request.preferred_instance_id,
        tags={str(name): str(value) for name, value in request.tags.items()} if request.tags else {},
        ranks=request.parallelism_hint or 1,
    )
