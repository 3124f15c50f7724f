"""The backends: a table of names, resolved on use. Vendors outside this tree use the entry-point group below."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from sagellm.errors import UserError, unknown

if TYPE_CHECKING:
    from sagellm.backends.base import Backend

ENTRY_POINTS = "sagellm.codegen"

BACKENDS = {
    "ascend": "sagellm.backends.ascend:AscendBackend",
    "cpu": "sagellm.backends.cpu:CpuBackend",
    "null": "sagellm.backends.null:NullBackend",
}


def names() -> list[str]:
    return sorted({*BACKENDS, *(e.name for e in entry_points(group=ENTRY_POINTS))})


def best() -> str:
    """The target that auto means: a vendor's whose device is here, for its chip, else the CPU.

    One whose software is not installed here cannot be it, and is left out.
    """
    for name in names():
        with suppress(ImportError, OSError):
            if name != "cpu" and (backend := load(name)).available:
                return f"{name}:{chip}" if (chip := backend.chip_here) else name
    return "cpu"


def load(name: str) -> Backend:
    """The backend of this name, or the best for `auto`; made on each call. A chip may follow: `ascend:310P`."""
    vendor, _, chip = (best() if name == "auto" else name).partition(":")
    chips = (chip,) if chip else ()
    if vendor in BACKENDS:
        module, _, attribute = BACKENDS[vendor].partition(":")
        make = getattr(import_module(module), attribute)
    else:
        entry = next((e for e in entry_points(group=ENTRY_POINTS) if e.name == vendor), None)
        if entry is None:
            raise _no_backend(name, vendor)
        make = entry.load()
    try:
        return make(*chips)
    except TypeError:
        if not chips:
            raise
        raise UserError(
            f"target {name!r}: {vendor} has no chips to choose from; accepted: {vendor}"
        ) from None


def _no_backend(target: str, name: str) -> UserError:
    from sagellm.backends import chips

    if name in chips.NAMES:
        accepted = ", ".join(("auto", *names()))
        return UserError(
            f"target {target!r}: no code generator for {chips.vendor(name).title}; accepted: {accepted}"
        )
    return unknown("target", target, ("auto", *names()))
