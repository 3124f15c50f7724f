"""A stream's journal: what an engine has said so far, so that another can go on with it.

Engines that tell token ids (vLLM's `return_token_ids`, which ours have too) are asked for them, and what the client did
not ask for is taken out again. Another sageLLM goes on behind these tokens (`resume_token_ids`); any other engine that
takes token ids gets prompt and output as one prompt, where this is the same thing.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import from_json, to_json

from sagellm.control_plane.endpoint import EngineLost
from sagellm.control_plane.frame import Frame

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
IDS = ("token_ids", "prompt_token_ids")
NOT_PLAIN = (
    "tools", "logprobs", "prompt_logprobs", "response_format", "structured_outputs", "guided_json",
    "guided_regex", "guided_choice", "guided_grammar", "presence_penalty", "frequency_penalty", "min_tokens",
    "stop", "echo",
)  # fmt: skip
"""Fields under which a prompt with the output behind it is not the same request as the first."""


class StreamJournal:
    """One streamed request, over one engine after another."""

    def __init__(self, path: str, body: Mapping[str, Any]):
        self._path, self._asked = path, dict(body)
        self._wants_ids = bool(body.get("return_token_ids"))
        prompt = body.get("prompt", "")
        one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        self._single = one and (body.get("n") or 1) == 1 and body.get("prompt_logprobs") is None
        self._head: dict[str, Any] | None = None
        """What all chunks of the answer have in common: id, created, model."""
        self._prompt: list[int] | None = None
        self._ids: list[int] = []
        self._told: list[int] = []
        """The last choice's tokens."""
        self._frame: Frame | None = None
        """Of the engine's chunks, once one has shown it."""
        self._known = True
        """Whether `_ids` are all tokens of what was passed on."""
        self._translated = False
        """Whether chunks come from the other route than the client's."""
        self._reasoned = False
        self.began = False
        """Whether the client has seen any output."""
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None

    @property
    def tokens(self) -> int:
        return len(self._ids)

    def request(self, features: frozenset[str], longest: int | None) -> tuple[str, dict[str, Any]]:
        """Route and body for an engine: from the beginning, or behind what there is. See `can_go_on`."""
        body = dict(self._asked)
        if self._single and "return_token_ids" in features:
            body["return_token_ids"] = True
        if "resume_token_ids" in features and body.get("seed") is None and body.get("temperature") != 0:
            body["seed"] = self._asked["seed"] = secrets.randbits(62)
        self._translated, self._frame = False, None
        if not self._ids:
            return self._path, body
        if "resume_token_ids" in features:
            body["resume_token_ids"] = self._ids.copy()
            return self._path, body
        assert self._prompt is not None
        for name in ("messages", "max_completion_tokens", "chat_template_kwargs", "add_generation_prompt"):
            body.pop(name, None)
        most = self._most()
        left = (longest or 2**31) - len(self._prompt) if most is None else most
        body |= {"prompt": [*self._prompt, *self._ids], "max_tokens": max(1, left - len(self._ids))}
        self._translated = self._path == CHAT
        return COMPLETIONS, body

    def _most(self) -> int | None:
        for name in ("max_completion_tokens", "max_tokens"):
            if self._asked.get(name) is not None:
                return self._asked[name]
        return None if self._path == CHAT else 16

    def can_go_on(self, features: frozenset[str]) -> bool:
        """Whether an engine with these features can take the stream over."""
        if not self.began:
            return True
        if not self._single or not self._known:
            return False
        if "resume_token_ids" in features:
            return True
        plain = not self._reasoned and not any(self._asked.get(name) for name in NOT_PLAIN)
        return plain and "return_token_ids" in features and self._prompt is not None

    def take(self, chunks: Iterable[bytes]) -> tuple[bytes, EngineLost | None]:
        """An engine's chunks as the client gets them, as events. With an error the engine is lost: one says that it
        failed, or is no JSON; what it said before that counts."""
        events: list[bytes] = []
        try:
            for data in chunks:
                if (said := self._chunk(data)) is not None:
                    events += (b"data: ", said, b"\n\n")
        except EngineLost as error:
            return b"".join(events), error
        return b"".join(events), None

    def _chunk(self, data: bytes) -> bytes | None:
        """None: there is nothing in it for the client."""
        if self._frame is not None and (found := self._frame.read(data)) is not None:
            said, ids = found
            self._ids += ids
            return said or None
        try:
            chunk = from_json(data)
        except ValueError as error:
            raise EngineLost(f"a chunk is no JSON: {data[:100]!r}") from error
        if "error" in chunk:
            error = chunk["error"]
            raise EngineLost(str(error.get("message", error) if isinstance(error, dict) else error))
        if self._head is None:
            self._head = {name: chunk[name] for name in ("id", "created", "model") if name in chunk}
        elif self._head.get("id") != chunk.get("id"):
            chunk |= self._head
        if chunk.get("usage"):
            self.usage = chunk["usage"] = self._counted(chunk["usage"])
        choices = chunk.get("choices", ())
        said = [self._choice(choice) for choice in choices]
        prompt = chunk.get("prompt_token_ids")
        if self._prompt is None and prompt is not None:
            self._prompt = list(prompt)
        if not self._wants_ids:
            chunk.pop("prompt_token_ids", None)
        if choices and not any(said) and not chunk.get("usage"):
            return None
        if self._translated:
            chunk["object"] = "chat.completion.chunk"
        said = to_json(chunk)
        if self._frame is None:
            self._frame = self._frame_of(data, chunk, said)
        return said

    def _frame_of(self, data: bytes, chunk: dict[str, Any], said: bytes) -> Frame | None:
        """Where others like this chunk are passed on as it was, but for text and token ids."""
        choices = chunk.get("choices", ())
        if self._wants_ids or chunk.get("usage") or len(choices) != 1 or not self._told:
            return None
        if b'"prompt_token_ids":[' in data:  # only the first has it
            return None
        (choice,) = choices
        delta = choice.get("delta")
        text = choice.get("text") if delta is None else delta.get("content")
        if not text or choice.get("finish_reason") or choice.get("logprobs") or (delta and len(delta) > 1):
            return None
        return Frame.of(data, said, text, self._told)

    def _choice(self, choice: dict[str, Any]) -> bool:
        """Write down what a choice says; whether there is something for the client."""
        ids, prompt = choice.get("token_ids"), choice.get("prompt_token_ids")
        self._told = ids or []
        if self._prompt is None and prompt is not None:
            self._prompt = list(prompt)
        if ids:
            self._ids += ids
        if self._translated:
            choice["delta"] = {"content": choice.pop("text")}
        delta = choice.get("delta")
        text = choice.get("text") if delta is None else {k: v for k, v in delta.items() if k != "role" and v}
        self._reasoned |= bool(delta) and bool(delta.get("reasoning_content") or delta.get("reasoning"))
        reason = choice.get("finish_reason")
        if text and not ids:
            self._known = False
        self.finish_reason = self.finish_reason or reason
        first = bool(delta) and "role" in delta and not self.began
        said = bool(text or reason or choice.get("logprobs"))
        self.began |= bool(text or ids or reason)
        if self._wants_ids:
            return True
        for name in IDS:
            choice.pop(name, None)
        return said or first

    def _counted(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Where the engine took the first part of the output for a part of the prompt."""
        if self._prompt is None or usage.get("prompt_tokens") in (None, len(self._prompt)):
            return usage
        total = usage["prompt_tokens"] + usage["completion_tokens"]
        made = total - len(self._prompt)
        return usage | {"prompt_tokens": len(self._prompt), "completion_tokens": made}

    def rest(self) -> list[bytes]:
        """Chunks that a client still waits for when its engine was lost behind the last token."""
        options = self._asked.get("stream_options") or {}
        if not options.get("include_usage") or self.usage is not None or self._prompt is None:
            return []
        kind = "chat.completion.chunk" if self._path == CHAT else "text_completion"
        prompt, made = len(self._prompt), len(self._ids)
        usage = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        return [to_json({**(self._head or {}), "object": kind, "choices": [], "usage": usage})]
