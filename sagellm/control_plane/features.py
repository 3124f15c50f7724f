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
}  # fmt: skip
"""Field of a request -> the feature it needs, where it is given and is neither null nor false."""
ROUTES = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
}
ALL = frozenset(FIELDS.values()) | frozenset(ROUTES.values())
PLAIN_TEXT = {"type": "text"}


def needed(path: str, body: Mapping[str, Any]) -> frozenset[str]:
    """Features that a request to this route needs."""
    found = {ROUTES[path]} if path in ROUTES else set()
    for name, feature in FIELDS.items():
        value = body.get(name)
        if value is not None and value is not False and value != PLAIN_TEXT and value != []:
            found.add(feature)
    return frozenset(found)
