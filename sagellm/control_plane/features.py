"""What a request needs of an engine, told from its body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIELDS = {
    "tools": "tools",
    "response_format": "grammar", "structured_outputs": "grammar", "guided_json": "grammar",
    "guided_regex": "grammar", "guided_choice": "grammar", "guided_grammar": "grammar",
    "logprobs": "logprobs", "top_logprobs": "logprobs", "prompt_logprobs": "prompt_logprobs",
    "echo": "echo", "logit_bias": "logit_bias", "cache_salt": "cache_salt",
    "return_token_ids": "return_token_ids", "resume_token_ids": "resume_token_ids",
} | {
    name: name
    for name in (
        "n", "stop", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "top_k", "min_p",
        "min_tokens", "ignore_eos", "stop_token_ids",
    )
}  # fmt: skip
"""Field of a request -> the feature it needs, where it is given and asks for anything."""
ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},), "n": (1,), "presence_penalty": (0,), "frequency_penalty": (0,),
    "repetition_penalty": (1,), "top_k": (0, -1), "min_p": (0,), "min_tokens": (0,),
}  # fmt: skip
"""Values, beside null, false and what is empty, that are as if the field was not there."""
ROUTES = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
}
TOKEN_IDS = "token_ids"
"""A prompt that is given as token ids."""
ALL = frozenset(FIELDS.values()) | frozenset(ROUTES.values()) | {TOKEN_IDS}
OPENAI = frozenset(
    {"chat", "completions", TOKEN_IDS, "n", "stop", "seed", "presence_penalty", "frequency_penalty"}
)
"""What is taken for granted where nothing but the API is known."""


def asks(name: str, value: Any) -> bool:
    """Whether a field with this value asks for anything."""
    empty = value is None or value is False or value in ("", [], {})
    return not empty and value not in ASKS_NOTHING.get(name, ())


def needed(path: str, body: Mapping[str, Any]) -> frozenset[str]:
    """Features that a request to this route needs."""
    found = {ROUTES[path]} if path in ROUTES else set()
    for name in FIELDS.keys() & body.keys():
        if asks(name, body[name]):
            found.add(FIELDS[name])
    given = body.get("prompt", body.get("input"))
    if isinstance(given, list) and given and not isinstance(given[0], str):
        found.add(TOKEN_IDS)
    return frozenset(found)
