"""From a client's request to the engine's sampling parameters."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from attrs import frozen

from sagellm.batch import SamplingParams
from sagellm.grammar import Grammar
from sagellm.server.errors import APIError
from sagellm.server.types import Sampling

log = logging.getLogger(__name__)


@frozen
class Defaults:
    """What a request that says nothing gets: the model's generation_config.json, else the OpenAI API's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, folder: Path) -> Defaults:
        path = folder / "generation_config.json"
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            known = {name: given[name] for name in cls.__slots__ if given.get(name) is not None}
            SamplingParams(**known)
            return cls(**known)
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, AttributeError, TypeError) as error:
            log.warning("%s is not used: %s", path, error)
            return cls()


def sampling_params(
    request: Sampling,
    defaults: Defaults,
    *,
    max_tokens: int,
    logprobs: int | None,
    grammar: Grammar | None,
) -> SamplingParams:
    """Raises UserError for what the engine does not accept."""

    def either(name: str) -> Any:
        value = getattr(request, name)
        return getattr(defaults, name) if value is None else value

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=either("temperature"),
        top_p=either("top_p"),
        top_k=max(0, either("top_k")),
        min_p=either("min_p"),
        repetition_penalty=either("repetition_penalty"),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        seed=None if request.seed is None else request.seed % 2**63,
        stop=request.stop or (),
        stop_token_ids=request.stop_token_ids or (),
        ignore_eos=request.ignore_eos,
        min_tokens=request.min_tokens or 0,
        logit_bias=_biases(request.logit_bias),
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
        n=request.n or 1,
        grammar=grammar,
    )


def _biases(given: dict[str, float] | None) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in (given or {}).items()}
    except ValueError:
        raise APIError(400, "logit_bias has a key that is no token id", param="logit_bias") from None
