"""Engines by kind: how each is started, and what its server is like. None is imported before it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from sagellm.errors import unknown

if TYPE_CHECKING:
    from sagellm.control_plane.adapters.base import ServerAdapter

ADAPTERS = {
    "sagellm": "sagellm.control_plane.adapters.sagellm:SageLLMAdapter",
    "vllm": "sagellm.control_plane.adapters.vllm:VLLMBackendAdapter",
    "lmdeploy": "sagellm.control_plane.adapters.lmdeploy:LMDeployAdapter",
    "chitu": "sagellm.control_plane.adapters.chitu:ChituAdapter",
}
OPENAI = ("llm", "embedding")
"""Kinds of which only the API is known: they can be attached to, and not started."""


def adapter(kind: str) -> type[ServerAdapter]:
    """Raises UserError for a kind that cannot be started."""
    if kind not in ADAPTERS:
        raise unknown("engine kind", kind, ADAPTERS)
    module, _, name = ADAPTERS[kind].partition(":")
    return getattr(import_module(module), name)
