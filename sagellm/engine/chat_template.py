"""Chat templates, in a sandbox: what they may call, how long they may take, and how much they may write.

They come from the model's folder or the operator, never from a request; but a model is a download too.
"""

from __future__ import annotations

import json
import re
import reprlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import cache
from typing import Any

import jinja2
from jinja2 import nodes, pass_eval_context
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from sagellm.errors import UserError

MAX_CHARACTERS = 4 * 2**20
"""Of a prompt, and of any text that a template makes by repeating another."""
MAX_SECONDS = 2.0
"""That a template may take."""
_TICK, _CONCAT = "_sagellm_tick", "_sagellm_concat"
_deadline: ContextVar[float] = ContextVar("deadline")


class _Refusal(jinja2.TemplateError):
    """What a template says with raise_exception."""


class _TooMuch(jinja2.TemplateError):
    """A limit that a template ran into."""


class _Generation(Extension):
    """`{% generation %}` marks what an assistant writes, for training; here it is only a scope."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


class _Watched(NodeTransformer):
    """Loops and macros look at the clock each time; `~` looks at what it makes."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking(node)

    def _ticking(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call(_TICK, [], node)).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call(_CONCAT, node.nodes, node)


def _call(name: str, arguments: list, at: nodes.Node) -> nodes.Call:
    call = nodes.Call(nodes.Name(name, "load"), arguments, [], None, None)
    return call.set_lineno(at.lineno, override=False)


class _Environment(ImmutableSandboxedEnvironment):
    """Nothing takes for ever, and nothing becomes larger than a prompt may be."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Watched().visit(super()._parse(source, name, filename)).set_environment(self)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sized = isinstance(left, _SIZED) or isinstance(right, _SIZED)
        match operator:
            case "**":
                size = MAX_CHARACTERS + 1
            case "+":
                size = _size(left) + _size(right) if sized else 0
            case "*":
                size = _size(left) * _size(right) if sized else 0
            case _:
                size = _width(left) if isinstance(left, str) else 0
        _bound(size, operator)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            _bound(_grown(text, method.__name__, arguments), method.__name__)
        return super().call(context, function, *arguments, **named)


_SIZED = (str, list, tuple)


def _size(value: Any) -> int:
    if isinstance(value, _SIZED):
        return len(value)
    return abs(value) if isinstance(value, int) else 1


def _bound(size: int, what: str) -> None:
    if size > MAX_CHARACTERS:
        raise _TooMuch(f"the result of {what} is too large")


def _width(format: str) -> int:
    """The largest number in a format: a width or a precision; `*` takes one from the values."""
    return (
        MAX_CHARACTERS + 1 if "*" in format else max(map(int, re.findall("[0-9]{1,18}", format)), default=0)
    )


def _grown(text: str, method: str, arguments: tuple) -> int:
    """At most how long a text becomes by this method of it."""
    match method, arguments:
        case "replace", (str(old), str(new), *_):
            return len(text) + (text.count(old) if old else len(text) + 1) * len(new)
        case "join", (some,) if isinstance(some, _SIZED):
            return sum(map(_size, some)) + len(text) * len(some)
        case (("ljust" | "rjust" | "center" | "zfill" | "expandtabs"), (int(width), *_)):
            return max(len(text), width * (1 + text.count("\t")))
        case (("format" | "format_map"), _):
            return _width(text)
    return len(text)


@pass_eval_context
def _replace(context: Any, text: Any, old: Any, new: Any, count: int | None = None) -> str:
    _bound(_grown(str(text), "replace", (str(old), str(new))), "replace")
    return FILTERS["replace"](context, text, old, new, count)


@pass_eval_context
def _join(context: Any, values: Any, between: str = "", attribute: Any = None) -> str:
    some = list(values)
    _bound(sum(len(str(value)) for value in some) + len(between) * len(some), "join")
    return FILTERS["join"](context, some, between, attribute)


def _center(text: Any, width: int = 80) -> str:
    _bound(width, "center")
    return FILTERS["center"](text, width)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    _bound(len(text) + _size(width) * (1 + text.count("\n")), "indent")
    return FILTERS["indent"](text, width, first, blank)


def _format(text: Any, *values: Any, **named: Any) -> str:
    _bound(_width(str(text)), "format")
    return FILTERS["format"](text, *values, **named)


def _concat(*values: Any) -> str:
    texts = [str(value) for value in values]
    _bound(sum(map(len, texts)), "~")
    return "".join(texts)


def _tick() -> str:
    if time.monotonic() > _deadline.get():
        raise _TooMuch(f"it takes more than {MAX_SECONDS:g} s")
    return ""


@contextmanager
def _limited() -> Iterator[None]:
    token = _deadline.set(time.monotonic() + MAX_SECONDS)
    try:
        yield
    finally:
        _deadline.reset(token)


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Unlike jinja's own filter, without escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@cache
def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.globals |= {_TICK: _tick, _CONCAT: _concat}
    bounded = {"replace": _replace, "join": _join, "center": _center, "indent": _indent, "format": _format}
    environment.filters |= bounded
    return environment


@cache
def compiled(source: str) -> jinja2.Template:
    """Raises whatever jinja2 or Python says of a malformed template."""
    return _environment().from_string(source)


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """The text. Raises UserError where the template refuses the messages, fails on them, or runs into a limit."""
    pieces, size = [], 0
    try:
        with _limited():
            for piece in template.generate(variables):
                size += len(piece)
                if size > MAX_CHARACTERS:
                    break
                pieces.append(piece)
    except _Refusal as error:
        raise UserError(f"the chat template refuses the messages: {one_line(error)}") from error
    except _TooMuch as error:
        raise UserError(f"the chat template does too much: {one_line(error)}") from error
    except Exception as error:  # a template may fail in any way that Python can
        raise UserError(
            f"the chat template fails on the messages: {type(error).__name__}: {one_line(error)}"
        ) from error
    if size > MAX_CHARACTERS:
        raise UserError(f"the prompt is over {MAX_CHARACTERS} characters; accepted: shorter messages")
    return "".join(pieces)


def check_messages(messages: Any) -> None:
    """That these are messages as templates want them. Raises UserError."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages is {reprlib.repr(messages)}; accepted: a list of one message or more")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(
                f"messages[{i}] is {reprlib.repr(message)}; accepted: an object with a role, which is text"
            )
        content = message.get("content")
        parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        absent = content is None and message["role"] == "assistant"
        if not (isinstance(content, str) or parts or absent):
            raise UserError(
                f"messages[{i}].content is {reprlib.repr(content)}; accepted: text or a list of objects"
                " (an assistant's may be absent)"
            )


def one_line(error: Exception, limit: int = 500) -> str:
    return " ".join(str(error).split())[:limit]
