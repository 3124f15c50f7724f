"""sageLLM: an LLM inference engine one can read.

`SageLLMEngine`, `SamplingParams`, `GenerateRequest` and `EngineConfig` can be had from here; each is imported when
it is used.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "SageLLMEngine": "sagellm.engine.engine",
    "GenerateRequest": "sagellm.engine.base",
    "SamplingParams": "sagellm.batch",
    "EngineConfig": "sagellm.config",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'sagellm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
