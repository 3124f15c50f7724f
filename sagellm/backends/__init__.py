"""The backends: a table of names, resolved on use. Vendors outside this tree use the entry-point group below."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from sagellm.errors import unknown

if TYPE_CHECKING:
    from sagellm.backends.base import Backend

ENTRY_POINTS = "sagellm.codegen"

BACKENDS = {"cpu": "sagellm.backends.cpu:CpuBackend"}


def names() -> list[str]:
    return sorted({*BACKENDS, *(e.name for e in entry_points(group=ENTRY_POINTS))})


def load(name: str) -> Backend:
    """The backend of this name, made on each call."""
    if name in BACKENDS:
        module, _, attribute = BACKENDS[name].partition(":")
        return getattr(import_module(module), attribute)()
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == name:
            return entry.load()()
    raise unknown("target", name, names())
