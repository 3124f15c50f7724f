"""A request on its way: OpenAI's body, and what the control plane knows of it."""

from __future__ import annotations

from typing import Any

from attrs import define, field

from sagellm.control_plane.routing.ask import KINDS, Ask, ask_of
from sagellm.control_plane.types import RequestMetadata, RequestType
from sagellm.errors import UserError

ROUTE_OF = {kind: route for route, kind in KINDS.items()}


@define(eq=False)
class Call:
    path: str
    body: dict[str, Any]
    metadata: RequestMetadata
    headers: dict[str, str] = field(factory=dict)
    """That go to the engine."""
    retries: int = 0
    """How often it was sent again."""
    ask: Ask = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.ask = ask_of(self.path, self.body, self.metadata)

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))


def call_of(request: RequestMetadata) -> Call:
    """Raises UserError where the prompt is missing."""
    kind = request.request_type
    body: dict[str, Any] = {"model": request.model_name}
    if kind is RequestType.EMBEDDING:
        if not request.embedding_texts:
            raise UserError("embedding_texts is empty; accepted: a list of texts")
        body |= {"model": request.embedding_model or request.model_name, "input": request.embedding_texts}
    else:
        if request.prompt is None:
            raise UserError("prompt is missing; accepted: a text, token ids, or messages for llm_chat")
        prompt = request.prompt
        if kind is RequestType.LLM_CHAT:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            body["messages"] = messages
        else:
            body["prompt"] = prompt
        body |= {"temperature": request.temperature, "top_p": request.top_p}
        if request.max_tokens is not None:
            body["max_tokens"] = request.max_tokens
    return Call(ROUTE_OF[kind], body, request, {"X-Request-ID": request.request_id})
