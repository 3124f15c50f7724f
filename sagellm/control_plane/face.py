"""OpenAI's API over an engine object of this process."""

from __future__ import annotations

from sagellm.control_plane.endpoint import AppEndpoint, Endpoint
from sagellm.control_plane.features import ALL
from sagellm.control_plane.remote import RemoteEngine
from sagellm.engine.base import BaseInferenceEngine
from sagellm.engine.engine import SageLLMEngine
from sagellm.errors import UserError


def endpoint_of(engine: BaseInferenceEngine) -> Endpoint:
    """Raises UserError for what is no engine."""
    if isinstance(engine, RemoteEngine):
        return engine.endpoint
    if isinstance(engine, SageLLMEngine):
        from sagellm.server.app import app_of

        return AppEndpoint(app_of(engine))
    if isinstance(engine, BaseInferenceEngine):
        from sagellm.control_plane.plain import plain_app

        return AppEndpoint(plain_app(engine))
    raise UserError(f"{engine!r} is no engine; accepted: a BaseInferenceEngine, or model_id, host and port")


def features_of(engine: BaseInferenceEngine) -> frozenset[str]:
    """Of requests, see `features.py`, that what `endpoint_of` gives can serve."""
    if isinstance(engine, RemoteEngine):
        return engine.FEATURES
    if isinstance(engine, SageLLMEngine):
        return ALL
    from sagellm.control_plane.plain import FEATURES

    return FEATURES
