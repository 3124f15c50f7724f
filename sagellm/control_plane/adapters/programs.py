"""Where engines' own programs are, and which devices they see."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from sagellm.errors import UserError, unknown

VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "ascend": "ASCEND_RT_VISIBLE_DEVICES"}
"""Variable that says which of a vendor's devices a process sees."""


def program(kind: str, usual: str) -> str:
    """`SAGELLM_PROGRAM_<KIND>` says it for an engine that lies in an environment of its own."""
    return os.environ.get(f"SAGELLM_PROGRAM_{kind.upper()}", usual)


def visible(device: str | None, accepted: Sequence[str]) -> Mapping[str, str]:
    """Variables for a device such as `cuda` or `cuda:0,1`. Raises UserError for one that is not accepted."""
    if device is None:
        return {}
    name, _, indices = device.partition(":")
    if name not in accepted:
        raise unknown("device", device, [f"{one}[:0,1,...]" if one in VISIBLE else one for one in accepted])
    if not indices:
        return {}
    if name not in VISIBLE or not all(index.isdecimal() for index in indices.split(",")):
        raise UserError(f"device is {device!r}; accepted: {name}{':0,1,...' if name in VISIBLE else ''}")
    return {VISIBLE[name]: indices}


def flags(given: Mapping[str, object]) -> list[str]:
    """Options and values, without those that are None."""
    return [word for name, value in given.items() if value is not None for word in (name, str(value))]
