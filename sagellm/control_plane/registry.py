"""Which engines there were, on disk, so that a control plane that is started again finds them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sagellm.control_plane.types import EngineInfo
from sagellm.documents import parse_json
from sagellm.errors import UserError

FIELDS = ("engine_id", "model_id", "host", "port", "engine_kind", "created_at", "metadata")


def state_folder(env: dict[str, str] | os._Environ[str] = os.environ) -> Path:
    """`SAGELLM_STATE`, or the user's folder for state (XDG Base Directory)."""
    if given := env.get("SAGELLM_STATE"):
        return Path(given)
    return Path(env.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "sagellm"


class Registry:
    """A JSON file; written whole and moved into place. Without a path nothing is kept."""

    def __init__(self, path: Path | None):
        self._path = path

    def write(self, engines: Iterable[EngineInfo]) -> None:
        """Those at an address; objects of this process end with it."""
        if self._path is None:
            return
        rows = [{name: getattr(info, name) for name in FIELDS} for info in engines if info.host is not None]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".new")
        draft.write_text(json.dumps({"engines": rows}, indent=1), encoding="utf-8")
        draft.replace(self._path)

    def read(self) -> list[dict[str, Any]]:
        """Arguments of `EngineInfo`. Raises UserError for a file that is no registry."""
        if self._path is None or not self._path.exists():
            return []
        given = parse_json(self._path.read_text(encoding="utf-8"), str(self._path))
        rows = given.get("engines") if isinstance(given, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{str(self._path)!r} is no registry; accepted: what a control plane wrote")
        return [{name: row[name] for name in FIELDS if name in row} for row in rows]
