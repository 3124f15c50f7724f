"""Which engines there were, on disk, so that a control plane that is started again finds them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
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
    """A JSON file; written whole and moved into place. Without a path nothing is kept.

    Keys of engines are in a file of their own beside it, `engines.keys` beside `engines.json`, that its owner alone can
    read. They are kept themselves, and not where they are to be found: who may register an engine could otherwise have
    any file of this machine sent to an address.
    """

    def __init__(self, path: Path | None):
        self._path = path

    def write(self, engines: Iterable[EngineInfo], keys: Mapping[str, str]) -> None:
        """Those at an address; objects of this process end with it. `keys`: engine id -> its API key."""
        if self._path is None:
            return
        rows = [{name: getattr(info, name) for name in FIELDS} for info in engines if info.host is not None]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if keys:
            _put(self._keys, keys, 0o600)
        else:
            self._keys.unlink(missing_ok=True)
        _put(self._path, {"engines": rows}, 0o644)

    @property
    def _keys(self) -> Path:
        assert self._path is not None
        return self._path.with_suffix(".keys")

    def read(self) -> list[dict[str, Any]]:
        """Arguments of `EngineInfo`. Raises UserError for a file that is no registry."""
        given = None if self._path is None else _get(self._path)
        if given is None:
            return []
        rows = given.get("engines") if isinstance(given, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{str(self._path)!r} is no registry; accepted: what a control plane wrote")
        return [{name: row[name] for name in FIELDS if name in row} for row in rows]

    def keys(self) -> dict[str, str]:
        """Engine id -> its API key. Raises UserError for a file that others can read."""
        given = None if self._path is None else _get(self._keys)
        if given is None:
            return {}
        mode = self._keys.stat().st_mode & 0o777
        if mode & 0o077:
            raise UserError(f"{str(self._keys)!r} has the mode {mode:o}; accepted: 600, as it holds keys")
        if not isinstance(given, dict) or not all(isinstance(key, str) for key in given.values()):
            raise UserError(f"{str(self._keys)!r} holds no keys; accepted: what a control plane wrote")
        return given


def _put(path: Path, content: Any, mode: int) -> None:
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)  # one of another mode would keep it
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    draft.replace(path)


def _get(path: Path) -> Any:
    """None where there is no such file. Raises UserError where it is no JSON."""
    return parse_json(path.read_text(encoding="utf-8"), str(path)) if path.exists() else None
