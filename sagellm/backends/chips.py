"""What is known of vendors and their chips: a folder each with `vendor.yaml`, and `evidence.yaml` of what was checked.

No value is here without its source. The tables are read when asked for; nothing of a vendor is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from attrs import field, frozen
from attrs.validators import optional

from sagellm import checks
from sagellm.documents import check_keys, read
from sagellm.errors import UserError, unknown
from sagellm.schemas import DTYPE_BYTES, FLOATS
from sagellm.target import CostModel, Figure

UNITS = {
    "GB": (1e9, "B"), "GiB": (2.0**30, "B"), "GB/s": (1e9, "B/s"), "TB/s": (1e12, "B/s"),
    "TFLOP/s": (1e12, "FLOP/s"), "PFLOP/s": (1e15, "FLOP/s"),
}  # fmt: skip
"""How many of what each is."""
REACHED = 0.7
"""Part of a published peak that large products and reads reach; assumed."""
HOW = {
    "silicon": "ran on silicon",
    "host code": "ran through the vendor's own host code, without the chip",
    "schema": "binds to the vendor's schema",
    "stand-in": "ran against a stand-in made from the vendor's documents",
    "call site": "as at a public call site; nothing ran",
    "none": "not checked",
}
"""How a capability may have been verified, best first."""
CAPABILITIES = ("detection", "emitted calls", "numbers", "whole engine", "collectives", "speed")
"""What is asked of every chip; one without evidence is not checked."""


@frozen(kw_only=True)
class Fact:
    """A value about a chip. `verified`: seen by running it, on the chip or in the vendor's own code, not only read."""

    value: Any
    source: str = field(validator=checks.text)
    unit: str = field(default="", validator=checks.instance_of(str, "a text"))
    verified: bool = field(default=False, validator=checks.flag)

    def figure(self) -> Figure:
        """In bytes, bytes a second or operations a second."""
        factor, unit = UNITS[self.unit]
        return Figure(value=self.value * factor, unit=unit, source=self.source)

    def __str__(self) -> str:
        if isinstance(self.value, tuple):
            return ", ".join(map(str, self.value)) or "none"
        return f"{self.value} {self.unit}".rstrip()


@frozen(kw_only=True)
class Sizes:
    """Which numbers kernels accept."""

    prefer: tuple[int, ...] = ()
    """Best first."""
    only: tuple[int, ...] = ()
    """None but these; empty: what the other fields allow."""
    multiple_of: int = 1
    at_most: int | None = None

    def allows(self, size: int) -> bool:
        if self.only:
            return size in self.only
        return size > 0 and size % self.multiple_of == 0 and (self.at_most is None or size <= self.at_most)

    def __str__(self) -> str:
        if self.only:
            return ", ".join(map(str, self.only))
        step = "any" if self.multiple_of == 1 else f"multiples of {self.multiple_of}"
        return step if self.at_most is None else f"{step} up to {self.at_most}"


def _types(accepted: Iterable[str]) -> checks.Check:
    of = checks.each(tuple, checks.one_of(accepted))
    return lambda instance, attribute, fact: of(instance, attribute, fact.value)


def _sizes(instance: object, attribute: Any, fact: Fact) -> None:
    checks.instance_of(Sizes, "prefer, only, multiple_of, at_most")(instance, attribute, fact.value)


def _number(instance: object, attribute: Any, fact: Fact) -> None:
    checks.number(above=0)(instance, attribute, fact.value)
    checks.one_of(UNITS)(instance, attribute, fact.unit)


@frozen(kw_only=True)
class Chip:
    """One chip. None: no source says it, or sources disagree too much."""

    vendor: str
    name: str
    ids: tuple[str, ...] = ()
    """Patterns of what a device calls itself, as fnmatch reads them; case does not matter."""
    family: str = ""
    """Chips that run the same programs, differing in size alone; by itself where none is named."""
    dtypes: Fact = field(validator=_types(FLOATS))
    """Of activations, best first."""
    quantized: Fact = field(validator=_types(DTYPE_BYTES))
    """Small types that it multiplies or its kernels read keys and values in, best first."""
    head_sizes: Fact = field(validator=_sizes)
    """`Sizes` of a head's key that the vendor's attention takes."""
    block_sizes: Fact = field(validator=_sizes)
    """`Sizes` of a KV block, in tokens."""
    memory: Fact | None = field(default=None, validator=optional(_number))
    bandwidth: Fact | None = field(default=None, validator=optional(_number))
    """Of memory."""
    link: Fact | None = field(default=None, validator=optional(_number))
    """To other chips, as published: of all its links together, both ways, unless the source says otherwise."""
    flops: dict[str, Fact] = field(factory=dict)
    """Peak, by dtype."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.vendor} {self.name}"

    @property
    def kind(self) -> str:
        """Its family, or its name."""
        return self.family or self.name

    def matches(self, ids: Iterable[str]) -> bool:
        return any(fnmatch(id_.lower(), pattern.lower()) for id_ in ids for pattern in self.ids)

    def check(self, dtype: str, head_dim: int, kv_dtype: str | None = None, block_size: int | None = None):
        """That the chip takes a model of this kind. Raises `UserError`, one line."""
        if dtype not in self.dtypes.value:
            raise UserError(f"dtype is {dtype!r} for {self}; accepted: {self.dtypes} ({self.dtypes.source})")
        if not self.head_sizes.value.allows(head_dim):
            raise UserError(
                f"head size is {head_dim} for {self}; accepted: {self.head_sizes} ({self.head_sizes.source})"
            )
        held = (*self.dtypes.value, *self.quantized.value)
        if kv_dtype is not None and kv_dtype not in held:
            raise UserError(f"kv dtype is {kv_dtype!r} for {self}; accepted: {', '.join(held)}")
        if block_size is not None and not self.block_sizes.value.allows(block_size):
            raise UserError(
                f"block_size is {block_size} for {self}; accepted: {self.block_sizes} ({self.block_sizes.source})"
            )

    def costs(self) -> CostModel | None:
        """From its published peaks; None where those of memory or arithmetic are not known."""
        if self.bandwidth is None or not self.flops:
            return None
        flops = {dtype: REACHED * fact.figure().value for dtype, fact in self.flops.items()}
        sources = dict.fromkeys(fact.source for fact in (self.bandwidth, *self.flops.values()))
        return CostModel(
            flops=flops,
            bytes_per_second=REACHED * self.bandwidth.figure().value,
            call=5e-6,
            source=f"{self}: {REACHED:.0%} of published peaks, assumed ({'; '.join(sources)})",
        )

    def facts(self) -> dict[str, Fact]:
        """All that is known, by name."""
        named = {name: getattr(self, name) for name in ("memory", "bandwidth", "link")}
        named |= {f"{dtype} peak": fact for dtype, fact in self.flops.items()}
        named |= {"dtypes": self.dtypes, "quantized": self.quantized}
        named |= {"head sizes": self.head_sizes, "KV blocks": self.block_sizes}
        return {name: fact for name, fact in named.items() if fact is not None}


def _capability(instance: object, attribute: Any, value: object) -> None:
    checks.text(instance, attribute, value)
    checks.one_of(CAPABILITIES)(instance, attribute, str(value).partition(":")[0])


@frozen(kw_only=True)
class Evidence:
    """That a capability was checked, and how."""

    capability: str = field(validator=_capability)
    """One of CAPABILITIES; behind a colon, of what."""
    how: str = field(validator=checks.one_of(HOW))
    by: str = field(validator=checks.text)
    """The test file or command that shows it."""
    chips: tuple[str, ...] = ()
    """Empty: all of the vendor."""

    def of(self, chip: str) -> bool:
        return not self.chips or chip in self.chips


@frozen(kw_only=True)
class Vendor:
    """How a vendor's devices are found and joined, and which there are."""

    name: str = field(validator=checks.text)
    """Also its backend's."""
    title: str = field(validator=checks.text)
    device: str = field(validator=checks.text)
    """torch's device string. Several vendors share `cuda`."""
    plugins: tuple[str, ...] = ()
    """Packages that make torch know the device, in the order of their import."""
    build: str | None = field(default=None, validator=optional(checks.one_of(("cuda", "hip"))))
    """What torch must be built for: the field of torch.version that is set."""
    install: str = field(validator=checks.text)
    """The command that brings what is missing."""
    visible: tuple[str, ...] = ()
    """Environment variables that choose devices."""
    nodes: tuple[str, ...] = ()
    """Files that its driver makes in /dev, as patterns."""
    identity: tuple[str, ...] = ()
    """Beside the name, what tells chips apart: functions of torch's module, or fields of a device's properties."""
    known_only: bool = field(default=False, validator=checks.flag)
    """A device that is none of `chips` is another vendor's."""
    network: str = field(validator=checks.text)
    """How its ranks speak: a name of `sagellm.backends.networks`."""
    topology: str = field(validator=checks.text)
    """How its chips are joined: a name of `sagellm.topology`."""
    chips: tuple[Chip, ...] = ()
    evidence: tuple[Evidence, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Vendor:
        """From a folder's `vendor.yaml`, and `evidence.yaml` where there is one. Raises `UserError`."""
        file = folder / "vendor.yaml"
        given = read(file)
        check_keys(str(file), {k: v for k, v in given.items() if k != "common"}, cls)
        common, chips = given.pop("common", {}), given.pop("chips", {})
        made = tuple(
            _chip(given["name"], name, common | each, f"{file}: {name}") for name, each in chips.items()
        )
        proof = folder / "evidence.yaml"
        entries = read(proof) if proof.exists() else []
        for entry in entries:
            check_keys(str(proof), entry, Evidence)
        return cls(
            chips=made, evidence=tuple(Evidence(**_tuples(entry)) for entry in entries), **_tuples(given)
        )

    def chip(self, name: str) -> Chip:
        """By its name, or the first one of the family of this name; case does not matter."""
        for chip in sorted(self.chips, key=lambda chip: chip.name.lower() != name.lower()):
            if name.lower() in (chip.name.lower(), chip.family.lower()):
                return chip
        accepted = dict.fromkeys(known for chip in self.chips for known in (chip.kind, chip.name))
        raise unknown(f"{self.title} chip", name, accepted)

    def recognise(self, ids: Iterable[str]) -> Chip | None:
        """The chip that calls itself so. What comes first in `ids` decides, as an architecture may be of several."""
        return next((chip for id_ in ids for chip in self.chips if chip.matches([id_])), None)

    def verified(self, chip: str, capability: str) -> str:
        """The best of HOW by which a capability of a chip was checked."""
        levels = [*HOW]
        here = (e for e in self.evidence if e.of(chip) and e.capability.partition(":")[0] == capability)
        return min((e.how for e in here), key=levels.index, default="none")


def _tuples(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _chip(vendor: str, name: str, given: Mapping[str, Any], where: str) -> Chip:
    check_keys(where, {"vendor": vendor, "name": name, **given}, Chip)
    try:
        facts = {
            key: {dtype: _fact(each, f"{where}: flops") for dtype, each in value.items()} if key == "flops"
            else _fact(value, f"{where}: {key}") if isinstance(value, Mapping)
            else value
            for key, value in given.items()
        }  # fmt: skip
        return Chip(vendor=vendor, name=name, **_tuples(facts))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _fact(given: Mapping[str, Any], where: str) -> Fact:
    check_keys(where, given, Fact)
    value = given["value"]
    if isinstance(value, Mapping):
        check_keys(where, value, Sizes)
        value = Sizes(**_tuples(value))
    return Fact(**{**given, "value": tuple(value) if isinstance(value, list) else value})


HERE = Path(__file__).parent
NAMES = ("ascend", "cambricon", "hygon", "kunlun", "cuda", "cpu")
"""The vendors of this tree, in the order in which `auto` would take them."""


@cache
def vendor(name: str) -> Vendor:
    """One of this tree."""
    if name not in NAMES:
        raise unknown("vendor", name, NAMES)
    return Vendor.read(HERE / name)


def find(vendor_name: str, name: str) -> Chip:
    """The chip of this vendor and name. Raises `UserError`."""
    return vendor(vendor_name).chip(name)
