"""Logprobs in the two forms that the OpenAI API has: of chats, and of completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sagellm.engine.events import Top
from sagellm.engine.tokenizer import Tokenizer

LOWEST = -9999.0
"""In the place of -inf, which JSON does not have."""


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    text = tokenizer.token_text(token)
    data = text.encode() if raw is None else raw
    return {"token": text, "logprob": finite(logprob), "bytes": list(data)}


def of_chat(
    tokenizer: Tokenizer, tokens: Sequence[int], logprobs: Iterable[tuple[float, Top]], top: int
) -> dict[str, Any]:
    content = []
    for token, (logprob, best) in zip(tokens, logprobs):
        entry = _token(tokenizer, token, logprob)
        entry["top_logprobs"] = [_token(tokenizer, *one) for one in best[:top]]
        content.append(entry)
    return {"content": content, "refusal": None}


def of_completion(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    logprobs: Iterable[tuple[float, Top] | None],
    top: int,
    offset: int,
) -> dict[str, Any]:
    """`offset`: characters of the text before the first of these tokens."""
    texts = [tokenizer.token_text(token) for token in tokens]
    listed: dict[str, Any] = {"tokens": texts, "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for text, pair in zip(texts, logprobs):
        listed["text_offset"].append(offset)
        offset += len(text)
        listed["token_logprobs"].append(None if pair is None else finite(pair[0]))
        best = None
        if pair is not None and top:
            best = {tokenizer.token_text(t): finite(value) for t, value in pair[1][:top]}
            best.setdefault(text, finite(pair[0]))
        listed["top_logprobs"].append(best)
    return listed
