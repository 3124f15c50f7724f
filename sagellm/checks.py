"""What a field may hold: validators for attrs classes. Each refusal is one line that names the field. A leaf."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from attrs import Attribute

from sagellm.errors import UserError, unknown

Check = Callable[[object, Any, Any], None]


def _refuse(attribute: Attribute, value: object, accepted: str) -> UserError:
    return UserError(f"{attribute.name} is {value!r}; accepted: {accepted}")


def _is_number(value: object, kinds: tuple[type, ...]) -> bool:
    """True is an int to Python, but not to a user."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def whole(low: int = 1) -> Check:
    def check(instance: object, attribute: Attribute, value: Any) -> None:
        if not _is_number(value, (int,)) or value < low:
            raise _refuse(attribute, value, f"a whole number of at least {low}")

    return check


def number(low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf) -> Check:
    """Finite, at least `low`, more than `above` and at most `high`."""
    bounds = [
        text
        for text, bound in (
            (f"at least {low:g}", low),
            (f"more than {above:g}", above),
            (f"at most {high:g}", high),
        )
        if math.isfinite(bound)
    ]
    accepted = f"a number {' and '.join(bounds)}".rstrip()

    def check(instance: object, attribute: Attribute, value: Any) -> None:
        fits = _is_number(value, (int, float)) and -math.inf < value < math.inf
        if not fits or not low <= value <= high or value <= above:
            raise _refuse(attribute, value, accepted)

    return check


def flag(instance: object, attribute: Attribute, value: Any) -> None:
    if not isinstance(value, bool):
        raise _refuse(attribute, value, "true or false")


def text(instance: object, attribute: Attribute, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise _refuse(attribute, value, "a text that is not empty")


def one_of(names: Iterable[str]) -> Check:
    accepted = tuple(names)

    def check(instance: object, attribute: Attribute, value: Any) -> None:
        if not isinstance(value, str) or value not in accepted:
            raise unknown(attribute.name, value, accepted)

    return check


def instance_of(kind: type, called: str) -> Check:
    def check(instance: object, attribute: Attribute, value: Any) -> None:
        if not isinstance(value, kind):
            raise _refuse(attribute, value, called)

    return check


def each(kind: type, of: Check) -> Check:
    """A collection of this kind whose every item passes the check."""
    accepted = {tuple: "a tuple (in a document, a list)", frozenset: "a frozenset (in a document, a list)"}[
        kind
    ]

    def check(instance: object, attribute: Attribute, value: Any) -> None:
        if not isinstance(value, kind):
            raise _refuse(attribute, value, accepted)
        for item in value:
            of(instance, attribute, item)

    return check


def table(of: Check) -> Check:
    """A dictionary from names to values that pass the check."""

    def check(instance: object, attribute: Attribute, value: Any) -> None:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise _refuse(attribute, value, "a mapping whose keys are texts")
        for item in value.values():
            of(instance, attribute, item)

    return check
