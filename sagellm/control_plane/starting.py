"""An engine's own server is started, wherever the launcher finds a place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import evolve

from sagellm.control_plane import adapters
from sagellm.control_plane.adapters.base import EngineOptions, ServerAdapter
from sagellm.control_plane.launch import Launcher
from sagellm.control_plane.types import EngineInfo


async def spawn(
    launcher: Launcher,
    kind: str,
    asked: EngineOptions,
    *,
    engine_id: str,
    port: int | None,
    metadata: Mapping[str, Any],
    log: Path,
) -> tuple[EngineInfo, ServerAdapter]:
    """The process is there when this returns, and not ready yet. Raises UserError where it cannot be started."""
    make = adapters.adapter(kind)
    place = await launcher.place(asked.device, asked.tensor_parallel * asked.pipeline_parallel)
    options = evolve(asked, host=place.host)
    engine = make.launched(options, place, port or await place.free_port(), engine_id=engine_id, log=log)
    facts = {"started": True, "tensor_parallel": asked.tensor_parallel} | dict(metadata)
    if asked.max_concurrent is not None:
        facts["max_concurrent"] = asked.max_concurrent
    if asked.device is not None:
        facts["device"] = asked.device
    await engine.spawn()
    facts["pid"] = engine.process.pid if engine.process else None
    info = EngineInfo(
        engine_id=engine_id,
        model_id=asked.served_model_name or asked.model,
        host=place.host,
        port=engine.port,
        engine_kind=kind,
        metadata=facts,
    )
    return info, engine
