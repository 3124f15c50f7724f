"""sageLLM: an LLM inference engine one can read."""

__version__ = "0.1.0"
