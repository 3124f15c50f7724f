"""`/v1/completions`: prompts, as text or token ids, and what follows them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from attrs import define, field
from fastapi import Request

from sagellm.engine.base import GenerateRequest, GenerateResult, Output, TokenEvent
from sagellm.engine.engine import Stream
from sagellm.engine.tokenizer import Tokenizer
from sagellm.grammar import Grammar
from sagellm.server.grammars import grammar_of
from sagellm.server.logprobs import of_completion
from sagellm.server.sampling import sampling_params
from sagellm.server.state import ServerState
from sagellm.server.streams import as_they_come, finish_reason, open_streams, to_the_end, usage_of
from sagellm.server.types import CompletionRequest, prompts_of


@define
class Completion:
    """One request on its way."""

    given: CompletionRequest
    model: str
    tokenizer: Tokenizer | None
    """Without one, choices have `token_ids` and no text."""
    id: str = field(factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(factory=lambda: int(time.time()))
    prompts: list[list[int]] = field(factory=list)
    resumed: str = ""
    """The text that the client has of an answer that goes on."""
    _shown: dict[int, int] = field(factory=dict)
    """Characters sent so far, by choice."""
    _begun: set[int] = field(factory=set)
    """Choices of which a chunk was sent."""

    def requests(self, state: ServerState, grammar: Grammar | None) -> list[GenerateRequest]:
        """`max_tokens` 0 asks for the prompt alone: one token is made and not shown."""
        given = self.given
        echoed = given.prompt_logprobs
        if given.echo and given.logprobs is not None and given.resume_token_ids is None:
            echoed = given.logprobs
        how = sampling_params(
            given.model_copy(update={"prompt_logprobs": echoed}),
            state.defaults,
            max_tokens=max(1, 16 if given.max_tokens is None else given.max_tokens),
            logprobs=given.logprobs,
            grammar=grammar,
        )
        prompts = prompts_of(given.prompt)
        names = [self.id] if len(prompts) == 1 else [f"{self.id}-{i}" for i in range(len(prompts))]
        return [
            GenerateRequest(
                id=name,
                prompt=prompt,
                sampling=how,
                priority=given.priority,
                salt=given.cache_salt or "",
                resume=given.resume_token_ids or (),
            )
            for name, prompt in zip(names, prompts)
        ]

    def opened(self, streams: list[Stream]) -> None:
        if self.given.resume_token_ids is not None:
            self.resumed = streams[0].resumed
            self._shown[0] = len(self._head(self.prompts[0]) + self.resumed)

    def whole(self, results: list[GenerateResult]) -> dict[str, Any]:
        choices = []
        for result, prompt in zip(results, self.prompts):
            for output in result.outputs:
                choices.append(self._choice(len(choices), result, output, prompt))
        usage = usage_of(results)
        if self.given.max_tokens == 0:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return self._object(choices) | {"usage": usage}

    def _choice(
        self, index: int, result: GenerateResult, output: Output, prompt: list[int]
    ) -> dict[str, Any]:
        given, nothing = self.given, self.given.max_tokens == 0
        head = self._head(prompt)
        tokens = [] if nothing else output.token_ids
        choice: dict[str, Any] = {
            "index": index,
            "text": head + ("" if nothing else output.text),
            "logprobs": None,
            "finish_reason": "length" if nothing else finish_reason(output.finish_reason),
            "stop_reason": output.stopped_by,
        }
        if given.logprobs is not None and self.tokenizer is not None:
            fresh = tokens[len(given.resume_token_ids or ()) :]
            pairs: list = list(zip(output.logprobs, output.top_logprobs))[: len(fresh)]
            offset = len(head + self.resumed)
            if given.echo:
                pairs, fresh, offset = [*(result.prompt_logprobs or []), *pairs], [*prompt, *fresh], 0
            choice["logprobs"] = of_completion(self.tokenizer, fresh, pairs, given.logprobs, offset)
        choice |= self._ids(index, prompt, tokens)
        if given.prompt_logprobs is not None:
            choice["prompt_logprobs"] = result.prompt_logprobs
        return choice

    def _head(self, prompt: list[int]) -> str:
        if not self.given.echo or self.tokenizer is None:
            return ""
        return self.tokenizer.decode(prompt, skip_special_tokens=False)

    def _ids(self, index: int, prompt: list[int], tokens: Sequence[int]) -> dict[str, list[int]]:
        """For a choice: its tokens, where they are wanted or there is no text; in its first chunk the prompt's too."""
        if not self.given.return_token_ids:
            return {"token_ids": list(tokens)} if self.tokenizer is None else {}
        first = index not in self._begun
        self._begun.add(index)
        return {"token_ids": list(tokens)} | ({"prompt_token_ids": prompt} if first else {})

    def _object(self, choices: list) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def pieces(self, which: int, event: TokenEvent) -> Iterable[dict[str, Any]]:
        given = self.given
        always = given.return_token_ids or self.tokenizer is None
        if not (event.text or event.finish_reason or event.logprobs or always):
            return
        index = which * (given.n or 1) + event.sample
        choice = {
            "index": index,
            "text": event.text,
            "logprobs": None,
            "finish_reason": finish_reason(event.finish_reason),
        }
        choice |= self._ids(index, self.prompts[which], event.ids)
        offset = self._shown.get(index, 0)
        self._shown[index] = offset + len(event.text)
        if given.logprobs is not None and self.tokenizer is not None:
            choice["logprobs"] = of_completion(
                self.tokenizer, event.ids, event.logprobs, given.logprobs, offset
            )
        yield self._object([choice])

    def heads(self) -> Iterable[dict[str, Any]]:
        """What an echo shows before the first token."""
        if not self.given.echo or self.given.resume_token_ids is not None:
            return
        n = self.given.n or 1
        for which, prompt in enumerate(self.prompts):
            text = self._head(prompt)
            for index in range(which * n, (which + 1) * n):
                self._shown[index] = len(text)
                choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
                yield self._object([choice | self._ids(index, prompt, ())])

    def tail(self, results: list[GenerateResult]) -> Iterable[dict[str, Any]]:
        if self.given.stream_options is not None and self.given.stream_options.include_usage:
            yield self._object([]) | {"usage": usage_of(results)}


async def complete(request: Request, state: ServerState, given: CompletionRequest):
    engine = state.serving(given.model)
    job = Completion(given, state.model_name, engine.tokenizer)
    asked = grammar_of(given)
    if asked is not None:
        await state.check(asked.grammar, asked.field)
    requests = job.requests(state, None if asked is None else asked.grammar)
    job.prompts = [engine.encode(r.prompt) for r in requests]
    streams = open_streams(engine, requests)
    job.opened(streams)
    if given.stream:
        return await as_they_come(request, streams, job.pieces, first=job.heads(), last=job.tail)
    return job.whole(await to_the_end(request, streams))
