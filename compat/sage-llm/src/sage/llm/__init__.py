"""sageLLM by SAGE's names."""

from sagellm.control_plane.client import AsyncInferenceClient, UnifiedInferenceClient

__all__ = ["AsyncInferenceClient", "UnifiedInferenceClient"]
