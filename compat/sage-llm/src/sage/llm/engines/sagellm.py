"""The engine, and the interface that all engines have."""

from sagellm.engine.base import BaseInferenceEngine
from sagellm.engine.engine import SageLLMEngine

__all__ = ["BaseInferenceEngine", "SageLLMEngine"]
