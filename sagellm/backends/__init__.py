"""The backends: a table of names, resolved on use. Vendors outside this tree use the entry-point group below."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.metadata import entry_points
from inspect import signature
from typing import TYPE_CHECKING, Any

from sagellm.errors import UserError, unknown

if TYPE_CHECKING:
    from sagellm.backends.base import Backend

ENTRY_POINTS = "sagellm.codegen"

BACKENDS = {
    "ascend": "sagellm.backends.ascend:AscendBackend",
    "cambricon": "sagellm.backends.cambricon:CambriconBackend",
    "cpu": "sagellm.backends.cpu:CpuBackend",
    "cuda": "sagellm.backends.cuda:CudaBackend",
    "hygon": "sagellm.backends.hygon:HygonBackend",
    "kunlun": "sagellm.backends.kunlun:KunlunBackend",
    "null": "sagellm.backends.null:NullBackend",
}
ALIASES = {"mlu": "cambricon", "dcu": "hygon", "xpu": "kunlun"}
"""What vendors call their devices; targets too."""


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


def parts(name: str) -> tuple[str, str | None, str | None]:
    """Vendor, chip and choice of kernels in a target's name, `dcu:BW1000+kernels`; None for what is left out."""
    stem, plus, choice = name.partition("+")
    vendor, colon, chip = stem.partition(":")
    return ALIASES.get(vendor, vendor), chip if colon else None, choice if plus else None


def load(name: str) -> Backend:
    """The backend of this name, or the best for `auto`; made on each call.

    A chip may follow, and a choice of kernels where the vendor's are not the default: `ascend:310P`, `dcu+kernels`,
    `dcu:BW1000+kernels`.
    """
    vendor, chip, choice = parts(best() if name == "auto" else name)
    if choice not in (None, "kernels"):
        raise unknown(f"choice in target {name!r}", choice, ("kernels",))
    if vendor in BACKENDS:
        module, _, attribute = BACKENDS[vendor].partition(":")
        make = getattr(import_module(module), attribute)
    else:
        entry = next((e for e in entry_points(group=ENTRY_POINTS) if e.name == vendor), None)
        if entry is None:
            raise _no_backend(name, vendor)
        make = entry.load()
    given: dict[str, Any] = {}
    for key, value, what in (("chip", chip, "chips"), ("vendor_kernels", choice and True, "kernels")):
        if value is None:
            continue
        if key not in signature(make).parameters:
            raise UserError(f"target {name!r}: {vendor} has no {what} to choose from; accepted: {vendor}")
        given[key] = value
    return make(**given)


def _no_backend(target: str, name: str) -> UserError:
    from sagellm.backends import chips

    if name in chips.NAMES:
        accepted = ", ".join(("auto", *names()))
        return UserError(
            f"target {target!r}: no code generator for {chips.vendor(name).title}; accepted: {accepted}"
        )
    return unknown("target", target, ("auto", *names()))
