"""What a backend makes of a graph: calls in order. No xDSL here; plans hold no operation.

A step's plan is a list of calls on numbered slots, bound by the runtime to its host functions. A model's plan is
Python source, straight-line calls, compiled once; the printed source is what runs.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

from attrs import define, field, frozen

from sagellm.errors import UserError


@frozen
class Call:
    """`outputs = op(*inputs, **static)`; inputs and outputs are slot numbers."""

    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    static: Mapping[str, Any]

    def __str__(self) -> str:
        outputs = ", ".join(f"s{slot}" for slot in self.outputs)
        arguments = [f"s{slot}" for slot in self.inputs] + [f"{k}={v!r}" for k, v in self.static.items()]
        return f"{outputs + ' = ' if outputs else ''}{self.op}({', '.join(arguments)})"


@frozen
class ExecutionPlan:
    """One step: its calls, and how many slots they use."""

    calls: tuple[Call, ...]
    slots: int

    def __str__(self) -> str:
        return "".join(f"{call}\n" for call in self.calls)


@define
class Program:
    """Emitted Python source with the functions it defines."""

    name: str
    source: str
    calls: Mapping[str, int]
    """Emitted kernel calls per function; for a layer function, per layer."""
    _functions: dict[str, Callable] = field(factory=dict, init=False, eq=False, repr=False)
    _code: CodeType = field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        filename = f"<sagellm {self.name}>"
        linecache.cache[filename] = (len(self.source), None, self.source.splitlines(True), filename)
        self._code: CodeType = compile(self.source, filename, "exec")

    def __getitem__(self, function: str) -> Callable:
        """One of its functions. The text is run on first use, as it imports what its vendor ships."""
        if not self._functions:
            try:
                exec(self._code, self._functions)
            except ImportError as error:
                raise UserError(
                    f"{self.name}: its code needs {error.name}, which is not installed here"
                ) from error
        return self._functions[function]
