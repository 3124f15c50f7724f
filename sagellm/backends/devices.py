"""Which devices are on this machine, whose they are, and why a vendor's are not. A probe never raises.

A device string does not say whose a device is: `cuda` is NVIDIA's, Hygon's and Kunlun's. What tells them apart is which
plug-in is installed and what torch is built for, never the compute capability: Ascend has none, and the ones that
Cambricon and Kunlun report are made up for programs that ask for it.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from attrs import asdict, field, frozen

from sagellm import backends
from sagellm.backends import chips
from sagellm.backends.chips import Chip, Vendor
from sagellm.errors import UserError

DEV = Path("/dev")


@frozen(kw_only=True)
class Device:
    """One device that was found."""

    index: int
    name: str
    """As its driver calls it."""
    ids: tuple[str, ...] = ()
    """What tells chips apart, beside the name."""
    memory: int | None = None
    """Bytes in all; None: it does not say."""
    chip: Chip | None = None
    """What is known of it; None: no descriptor fits."""


@frozen(kw_only=True)
class Look:
    """Something that was looked for."""

    what: str
    found: bool
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {(self.detail or 'yes') if self.found else 'no'}"


@frozen(kw_only=True)
class Probe:
    """What came of looking for a vendor's devices."""

    vendor: Vendor
    devices: tuple[Device, ...] = ()
    looked: tuple[Look, ...] = ()
    why_none: str = ""
    """One line; empty where there are some."""
    missing: str = ""
    """The package that would have to be installed, if that is why."""

    @property
    def found(self) -> bool:
        return bool(self.devices)

    def refusal(self) -> UserError:
        """Why a program for this vendor cannot run here, with what would help."""
        vendor = self.vendor
        lacks = f"device {vendor.name!r}: {self.why_none}"
        return UserError(
            f"{lacks}; install: {vendor.install}" if self.missing else f"{lacks} ({vendor.title})"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON shows it."""
        shown = [
            {
                "index": d.index,
                "name": d.name,
                "ids": d.ids,
                "memory": d.memory,
                "chip": d.chip and d.chip.name,
            }
            for d in self.devices
        ]
        return {
            "title": self.vendor.title,
            "device": self.vendor.device,
            "found": self.found,
            "devices": shown,
            "looked_for": [asdict(look) for look in self.looked],
            "why_none": self.why_none or None,
            "install": None if self.found else self.vendor.install,
        }


class _NotHere(Exception):
    """Looking for a vendor's devices ends: there are none. The text says why."""

    def __init__(self, why: str, missing: str = ""):
        super().__init__(why)
        self.missing = missing


@frozen(kw_only=True)
class _Search:
    """One search, which keeps account of what it looked for."""

    vendor: Vendor
    others: tuple[Vendor, ...]
    """Vendors that may share its device string."""
    looked: list[Look] = field(factory=list)

    def look(self, what: str, found: bool, detail: object = "") -> bool:
        self.looked.append(Look(what=what, found=found, detail=str(detail)))
        return found

    def run(self) -> tuple[Device, ...]:
        if self.vendor.device == "cpu":
            return (_processor(self.vendor),)
        self._machine()
        for package in self.vendor.plugins:
            if not self.look(f"package {package}", _installed(package)):
                raise _NotHere(f"package {package} is not installed", package)
        torch = self._torch()
        for package in self.vendor.plugins:
            _attempt(f"package {package} cannot be imported", lambda package=package: import_module(package))
        module = getattr(torch, self.vendor.device, None)
        if not self.look(f"torch.{self.vendor.device}", module is not None):
            raise _NotHere(f"torch has no torch.{self.vendor.device}")
        count = self._count(module)
        found = tuple(self._device(module, index) for index in range(count))
        ours = tuple(device for device in found if device.chip or not self.vendor.known_only)
        if not ours:
            ids = ", ".join((found[0].name, *found[0].ids))
            raise _NotHere(f"the devices are another vendor's ({ids})")
        return ours

    def _machine(self) -> None:
        """What may be seen without torch."""
        for pattern in self.vendor.nodes:
            names = sorted(path.name for path in DEV.glob(pattern))
            self.look(f"{DEV}/{pattern}", bool(names), ", ".join(names))
        for name in self.vendor.visible:
            self.look(f"variable {name}", name in os.environ, os.environ.get(name, ""))

    def _torch(self) -> Any:
        """torch, if it is built for this vendor and the device string is not another's."""
        vendor = self.vendor
        for other in self.others:
            if vendor.build and other.device == vendor.device and other.plugins:
                theirs = all(_installed(package) for package in other.plugins)
                self.look(f"package {other.plugins[0]}, which is {other.title}'s", theirs)
                if theirs:
                    raise _NotHere(
                        f"{vendor.device!r} is {other.title} here ({other.plugins[0]} is installed)"
                    )
        torch = _attempt("torch cannot be imported", lambda: import_module("torch"))
        if vendor.build:
            version = getattr(torch.version, vendor.build, None)
            if not self.look(f"torch.version.{vendor.build}", version is not None, version or ""):
                raise _NotHere(f"torch {torch.__version__} is not built for {vendor.title}", "torch")
        return torch

    def _count(self, module: Any) -> int:
        name = f"torch.{self.vendor.device}"
        available = _attempt(f"{name}.is_available() fails", module.is_available)
        count = _attempt(f"{name}.device_count() fails", module.device_count) if available else 0
        if self.look(f"{name}.device_count()", count > 0, count):
            return count
        hidden = [f"{v}={os.environ[v]}" for v in self.vendor.visible if v in os.environ]
        nodes = [look for look in self.looked if look.what.startswith(str(DEV)) and look.found]
        if hidden:
            raise _NotHere(f"{name} sees no device ({', '.join(hidden)})")
        raise _NotHere(f"{name} sees no device{', though its driver is here' if nodes else ''}")

    def _device(self, module: Any, index: int) -> Device:
        """What a device says; where it fails to say something, that is left out."""
        properties = _or_none(lambda: module.get_device_properties(index))
        name = (
            getattr(properties, "name", None) or _or_none(lambda: module.get_device_name(index)) or "unnamed"
        )
        said = [_identity(module, properties, source) for source in self.vendor.identity]
        ids = tuple(str(each) for each in said if each is not None)
        memory = getattr(properties, "total_memory", None) or _or_none(lambda: module.mem_get_info(index)[1])
        chip = self.vendor.recognise((str(name), *ids))
        return Device(index=index, name=str(name), ids=ids, memory=memory and int(memory), chip=chip)


def _attempt(what: str, do: Callable[[], Any]) -> Any:
    try:
        return do()
    except (Exception, SystemExit) as error:  # a driver's module may fail in any way
        raise _NotHere(f"{what}: {_one_line(error)}") from error


def _or_none(do: Callable[[], Any]) -> Any:
    try:
        return do()
    except Exception:  # as above; what is not said is not known
        return None


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _identity(module: Any, properties: Any, source: str) -> Any:
    function = getattr(module, source, None)
    return _or_none(function) if callable(function) else getattr(properties, source, None)


def _installed(package: str) -> bool:
    """Without importing it. One that is imported already may have no spec."""
    if package in sys.modules:
        return sys.modules[package] is not None
    return _or_none(lambda: find_spec(package)) is not None


def _processor(vendor: Vendor) -> Device:
    machine = platform.machine()
    memory = _or_none(lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return Device(
        index=0,
        name=_or_none(_model_name) or platform.processor() or machine,
        ids=(machine,),
        memory=memory,
        chip=vendor.recognise([machine]),
    )


def _model_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def vendors() -> tuple[Vendor, ...]:
    """Those of this tree, in the order in which `auto` would take them, and those of backends from elsewhere."""
    theirs = []
    for name in sorted(set(backends.names()) - {*backends.BACKENDS, *chips.NAMES}):
        if (vendor := _or_none(lambda name=name: backends.load(name).vendor)) is not None:
            theirs.append(vendor)
    return (*map(chips.vendor, chips.NAMES), *theirs)


def probe(vendor: Vendor, others: Iterable[Vendor] | None = None) -> Probe:
    """Look for the devices of a vendor. Never raises. `others` may share its device string; None: all there are."""
    search = _Search(vendor=vendor, others=tuple(vendors() if others is None else others))
    devices, why, missing = (), "", ""
    try:
        devices = search.run()
    except _NotHere as reason:
        why, missing = str(reason), reason.missing
    except Exception as error:  # what a module that stands in for another may yet do
        why = f"looking for devices fails: {_one_line(error)}"
    return Probe(vendor=vendor, devices=devices, looked=tuple(search.looked), why_none=why, missing=missing)


def free_memory(vendor: Vendor) -> int | None:
    """Bytes free on the current device of a vendor; None where there is none, or it does not say."""
    if not probe(vendor).found:
        return None
    return _or_none(lambda: int(getattr(import_module("torch"), vendor.device).mem_get_info()[0]))
