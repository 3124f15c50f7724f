"""`/v1/embeddings`: a vector for each input."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from fastapi import Request

from sagellm.engine.base import GenerateRequest
from sagellm.server.errors import APIError
from sagellm.server.state import ServerState
from sagellm.server.streams import open_streams, to_the_end
from sagellm.server.types import EmbeddingRequest, prompts_of


async def embed(request: Request, state: ServerState, given: EmbeddingRequest) -> dict[str, Any]:
    engine = state.serving(given.model)
    hidden = engine.front.link.info.hidden_size
    if given.dimensions not in (None, hidden):
        raise APIError(
            400,
            f"dimensions is {given.dimensions}; accepted: {hidden}, as the model has it",
            param="dimensions",
        )
    asked = [
        GenerateRequest(prompt=prompt, pooling=given.pooling, priority=given.priority)
        for prompt in prompts_of(given.input)
    ]
    results = await to_the_end(request, open_streams(engine, asked))
    vectors = np.array([result.embedding for result in results], np.float32)
    if given.normalize:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    tokens = sum(result.prompt_tokens for result in results)
    as_text = given.encoding_format == "base64"
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(vector.astype("<f4")).decode() if as_text else vector.tolist(),
            }
            for i, vector in enumerate(vectors)
        ],
        "model": state.model_name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
