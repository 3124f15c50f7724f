"""References in the place of a vendor's calls: each call is bound to the vendor's schema and checked by its rules.

Operators are defined in torch's registry under the vendor's own names, Python functions in modules of those names. So
this belongs into a process of its own, in which the vendor's software is not loaded.
"""

from __future__ import annotations

import sys
import types
from collections import Counter
from typing import Any

import torch
from attrs import define, field
from torch import library as registry

from sagellm.backends.contract import Call, Contract


class ContractBroken(Exception):
    """A call that the vendor's schema or hardware refuses: layer (`bind` or `constraints`), call and reason."""

    def __init__(self, layer: str, call: str, reason: str):
        super().__init__(f"{layer}: {call}: {reason}")
        self.layer = layer


@define
class Record:
    """The calls that were made."""

    counts: Counter[str] = field(factory=Counter)
    calls: list[str] = field(factory=list)
    """Names in order, as far as `keep` says."""
    keep: int = 0

    def note(self, name: str) -> None:
        self.counts[name] += 1
        if len(self.calls) < self.keep:
            self.calls.append(name)


def checked(call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Bind the arguments, apply the rules, and give what the reference computes."""
    try:
        bound = call.bind(args, kwargs)
    except TypeError as error:
        raise ContractBroken("bind", call.name, str(error)) from error
    if broken := call.broken(bound):
        raise ContractBroken("constraints", call.name, "; ".join(broken))
    arguments = {name: value for name, value in vars(bound).items() if name != "given"}
    return call.reference(**arguments)


def install(contract: Contract) -> Record:
    """Put stand-ins in the place of all calls of the contract; what is called is noted in the record."""
    record = Record()
    for name in contract.modules:
        _module(name)
    for call in contract.calls:

        def stand_in(*args, _call=call, **kwargs):
            record.note(_call.name)
            return checked(_call, args, kwargs)

        target = stand_in
        if "::" in call.name:
            target = _operator(call, stand_in)
        else:
            _attribute(call.name, stand_in)
        for name in call.also:
            _attribute(name, target)
    return record


_LIBRARIES: dict[str, registry.Library] = {}
"""Definitions last as long as these."""


def _operator(call: Call, stand_in) -> Any:
    space, _, rest = call.schema.partition("::")
    if space not in _LIBRARIES:
        _LIBRARIES[space] = registry.Library(space, "FRAGMENT")
    library, name = _LIBRARIES[space], call.name.partition("::")[2]
    library.define(rest)
    library.impl(name, stand_in, "CompositeExplicitAutograd")
    return getattr(getattr(torch.ops, space), name)


def _module(name: str) -> types.ModuleType:
    """The module of this dotted name, made with its parents where it is missing."""
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(_module(parent), child, sys.modules[name])
    return sys.modules[name]


def _attribute(dotted: str, value: Any) -> None:
    module, _, name = dotted.rpartition(".")
    setattr(_module(module), name, value)
