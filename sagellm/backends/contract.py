"""What a vendor's calls want and mean, so that emitted code can be checked without the chip.

A vendor lists the calls its code generator emits, each with its schema and where that is from, a reference in stock
torch, and rules for what the hardware refuses although the host code accepts it. `sagellm/conformance` puts
stand-ins in their place.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import torch
from attrs import define, field

Rule = Callable[[SimpleNamespace], str | None]
"""Of the bound arguments: what is wrong with them, or None."""

CONFIDENCE = {
    "A": "schema read from the vendor's own binary",
    "B": "schema in public source",
    "C": "signature in public source, schema derived",
    "D": "only call sites are public",
}


@define(slots=False)
class Call:
    """One vendor call."""

    schema: str
    """`ns::op(Tensor x, ...) -> ...` as torch writes it, or `module.function(x, *, y=1)` as Python does."""
    reference: Callable[..., Any]
    """What it computes, in stock torch; arguments as in the schema."""
    confidence: str
    """One of `CONFIDENCE`."""
    source: str
    """Where schema, meaning and rules are from."""
    rules: tuple[Rule, ...] = ()
    kernels: tuple[str, ...] = ()
    """Device kernels of which the vendor's host code launches one for it, by chip."""
    also: tuple[str, ...] = field(default=())
    """Python names under which it is called too, such as `torch_npu._npu_reshape_and_cache`."""

    @cached_property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    @cached_property
    def signature(self) -> inspect.Signature:
        if "::" not in self.schema:
            return _python_signature(self.schema)
        P = inspect.Parameter
        parameters = []
        for a in torch._C.parse_schema(self.schema).arguments:
            kind = P.KEYWORD_ONLY if a.kwarg_only else P.POSITIONAL_OR_KEYWORD
            default = a.default_value if a.has_default_value() else P.empty
            parameters.append(P(a.name, kind, default=default))
        return inspect.Signature(parameters)

    def bind(self, args: tuple, kwargs: Mapping[str, Any]) -> SimpleNamespace:
        """The arguments by name, defaults filled in. Raises `TypeError` where they do not fit."""
        bound = self.signature.bind(*args, **kwargs)
        given = SimpleNamespace(given=frozenset(bound.arguments))
        bound.apply_defaults()
        given.__dict__.update(bound.arguments)
        return given

    def broken(self, arguments: SimpleNamespace) -> list[str]:
        """What its rules have against these arguments."""
        return [said for rule in self.rules if (said := rule(arguments)) is not None]


def _python_signature(text: str) -> inspect.Signature:
    """Of `module.function(x, y=1, *, z=None)`; defaults are literals, or torch's names such as `torch.half`."""
    (function,) = ast.parse(f"def f({text.partition('(')[2]}: ...").body
    assert isinstance(function, ast.FunctionDef)
    given, P = function.args, inspect.Parameter
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
    kinds = [(a, d, P.POSITIONAL_OR_KEYWORD) for a, d in zip(positional, defaults)]
    kinds += [(a, d, P.KEYWORD_ONLY) for a, d in zip(given.kwonlyargs, given.kw_defaults)]
    return inspect.Signature(
        [P(a.arg, kind, default=P.empty if d is None else _default(d)) for a, d, kind in kinds]
    )


def _default(node: ast.expr) -> Any:
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch":
        return getattr(torch, node.attr)
    return ast.literal_eval(node)


@define
class Contract:
    """All calls that a vendor's emitted code may make."""

    calls: tuple[Call, ...]
    modules: tuple[str, ...] = ()
    """Python modules that emitted code imports, and that only the vendor ships."""
    host_code: bool = False
    """Whether the vendor's own host code can be run without a device."""

    def find(self, name: str) -> Call | None:
        return next((c for c in self.calls if name in (c.name, *c.also)), None)


def read_schemas(package: str) -> dict[str, str]:
    """The lines of a package's `schemas.txt` by the name of their call; those with # are comments."""
    lines = files(package).joinpath("schemas.txt").read_text(encoding="utf-8").splitlines()
    return {line.partition("(")[0]: line for line in lines if line and not line.startswith("#")}


def same_dtype(*names: str) -> Rule:
    """That these arguments have one dtype."""

    def rule(a) -> str | None:
        types = {n: str(getattr(a, n).dtype) for n in names}
        return f"{types} are not of one type" if len(set(types.values())) > 1 else None

    return rule


def contiguous(*names: str) -> Rule:
    """That these arguments lie in memory as their shape says."""

    def rule(a) -> str | None:
        return next((f"{n} is not contiguous" for n in names if not getattr(a, n).is_contiguous()), None)

    return rule


def one_of(name: str, values: tuple) -> Rule:
    """That this argument is one of the values."""

    def rule(a) -> str | None:
        value = getattr(a, name)
        return None if value in values else f"{name} is {value!r}; accepted: {', '.join(map(str, values))}"

    return rule
