"""The control plane, and what it speaks of."""

from sagellm.control_plane.manager import ControlPlaneConfig, ControlPlaneManager
from sagellm.control_plane.types import EngineInfo, RequestMetadata, RequestPriority, RequestType
from sagellm.engine.base import EngineState

__all__ = [
    "ControlPlaneConfig",
    "ControlPlaneManager",
    "EngineInfo",
    "EngineState",
    "RequestMetadata",
    "RequestPriority",
    "RequestType",
]
