"""`/v1/chat/completions`: a conversation, and the next message of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Any

from attrs import define, field
from fastapi import Request

from sagellm.engine.base import GenerateRequest, GenerateResult, Output, TokenEvent
from sagellm.engine.tokenizer import Tokenizer
from sagellm.errors import UserError
from sagellm.server.errors import APIError
from sagellm.server.logprobs import of_chat
from sagellm.server.sampling import sampling_params
from sagellm.server.state import ServerState
from sagellm.server.streams import as_they_come, finish_reason, open_streams, to_the_end, usage_of
from sagellm.server.types import ChatRequest, Message


def template_message(message: Message) -> dict[str, Any]:
    """As chat templates want it: text as one string, absent fields left out."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    fields: dict[str, Any] = {"role": message.role, "content": content}
    if message.name is not None:
        fields["name"] = message.name
    return fields


@define
class Chat:
    """One request on its way."""

    given: ChatRequest
    model: str
    tokenizer: Tokenizer
    id: str = field(factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(factory=lambda: int(time.time()))

    def request(self, state: ServerState) -> GenerateRequest:
        given = self.given
        try:
            text = self.tokenizer.apply_chat_template(
                [template_message(m) for m in given.messages],
                add_generation_prompt=given.add_generation_prompt,
                **(given.chat_template_kwargs or {}),
            )
        except UserError as error:
            raise APIError(400, str(error), param="messages") from error
        prompt = self.tokenizer.encode(text, add_special_tokens=False)
        longest = state.ready().get_capability().max_sequence_length or len(prompt) + 1
        asked = given.max_tokens if given.max_completion_tokens is None else given.max_completion_tokens
        how = sampling_params(
            given,
            state.defaults,
            max_tokens=max(1, longest - len(prompt)) if asked is None else asked,
            logprobs=(given.top_logprobs or 0) if given.logprobs else None,
        )
        return GenerateRequest(
            prompt=prompt, sampling=how, priority=given.priority, salt=given.cache_salt or ""
        )

    def whole(self, result: GenerateResult) -> dict[str, Any]:
        choices = [self._choice(i, output) for i, output in enumerate(result.outputs)]
        more = {} if result.prompt_logprobs is None else {"prompt_logprobs": result.prompt_logprobs}
        return self._object("chat.completion", choices) | {"usage": usage_of([result])} | more

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output.token_ids, zip(output.logprobs, output.top_logprobs)),
            "finish_reason": finish_reason(output.finish_reason),
            "stop_reason": output.stopped_by,
        }

    def _logprobs(self, tokens, pairs) -> dict[str, Any] | None:
        if not self.given.logprobs:
            return None
        return of_chat(self.tokenizer, tokens, pairs, self.given.top_logprobs or 0)

    def _object(self, kind: str, choices: list) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _chunk(self, index: int, delta: dict, reason: str | None = None, logprobs: Any = None) -> dict:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._object("chat.completion.chunk", [choice])

    def heads(self) -> Iterable[dict[str, Any]]:
        for index in range(self.given.n or 1):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def pieces(self, which: int, event: TokenEvent) -> Iterable[dict[str, Any]]:
        if not (event.text or event.finish_reason or event.logprobs):
            return
        delta = {"content": event.text} if event.text else {}
        reason = finish_reason(event.finish_reason)
        yield self._chunk(event.sample, delta, reason, self._logprobs(event.ids, event.logprobs))

    def tail(self, results: list[GenerateResult]) -> Iterable[dict[str, Any]]:
        if self.given.stream_options is not None and self.given.stream_options.include_usage:
            yield self._object("chat.completion.chunk", []) | {"usage": usage_of(results)}


async def chat(request: Request, state: ServerState, given: ChatRequest):
    engine = state.serving(given.model)
    job = Chat(given, state.model_name, state.tokenizer())
    streams = open_streams(engine, [job.request(state)])
    if given.stream:
        return await as_they_come(request, streams, job.pieces, first=job.heads(), last=job.tail)
    (result,) = await to_the_end(request, streams)
    return job.whole(result)
