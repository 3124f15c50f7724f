"""What an output must look like, as clients ask for it: `response_format`, vLLM's fields, calls that are forced."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from attrs import evolve, frozen

from sagellm.engine.tokenizer import Tokenizer
from sagellm.errors import UserError
from sagellm.grammar import ANY_OBJECT, Grammar
from sagellm.server.errors import APIError
from sagellm.server.parsing import FORMS, THINK, THOUGHT
from sagellm.server.types import Function, Sampling


@frozen
class Asked:
    """A grammar, and the field that asks for it."""

    field: str
    grammar: Grammar


def grammar_of(given: Sampling) -> Asked | None:
    """Raises APIError, naming the field, where it is wrong or there are several."""
    some = {
        f"guided_{kind}": getattr(given, f"guided_{kind}") for kind in ("json", "regex", "choice", "grammar")
    }
    if given.structured_outputs is not None:
        fields = given.structured_outputs.model_dump(exclude_none=True, by_alias=True)
        some |= {f"structured_outputs.{kind}": value for kind, value in fields.items()}
    some = {field: value for field, value in some.items() if value not in (None, False)}
    form = given.response_format
    if form is not None and form.type == "json_object":
        some["response_format"] = ANY_OBJECT
    elif form is not None and form.type == "json_schema":
        schema = form.json_schema.schema_
        some["response_format.json_schema.schema"] = ANY_OBJECT if schema is None else schema
    if len(some) > 1:
        raise APIError(400, f"{' and '.join(some)} are given; accepted: one of them", param=list(some)[1])
    for field, value in some.items():
        kind = "json" if field.startswith("response_format") else field.removeprefix("guided_").split(".")[-1]
        try:
            return Asked(field, _MAKE[kind](value))
        except UserError as error:
            raise APIError(400, f"{field}: {error}", param=field) from error
    return None


def _ebnf(text: str) -> Grammar:
    """Rules are written with `::=` in GBNF, and with `:` in Lark."""
    return Grammar.gbnf(text) if re.search(r"^\s*[\w-]+\s*::=", text, re.MULTILINE) else Grammar.lark(text)


_MAKE = {
    "json": Grammar.json,
    "regex": Grammar.regex,
    "choice": Grammar.choice,
    "grammar": _ebnf,
    "json_object": lambda _: Grammar.json(),
}


# calls of tools

Mark = Callable[[str], str]
"""A mark of a model's form as Lark has it: a text, or a token of its own."""


def marks_of(tokenizer: Tokenizer) -> Mark:
    def mark(text: str) -> str:
        token = tokenizer.token_id(text)
        return json.dumps(text, ensure_ascii=False) if token is None else f"<[{token}]>"

    return mark


@frozen
class Calls:
    """What may be called, and how the model marks it."""

    form: str
    functions: Sequence[Function]
    several: bool
    """One or more calls, not just one."""

    def rules(self, mark: Mark) -> str:
        """In Lark: `calls` is a text that `parsing.FORMS[form]` reads as calls of these functions."""
        begin, end = (mark(text) if text else "" for text in (FORMS[self.form].begin, FORMS[self.form].end))
        more = ' ("\\n" one)*' if self.several else ""
        match self.form:
            case "llama":
                return f"calls: %json {json.dumps(self._any_call('parameters'))}"
            case "hermes":
                call = json.dumps(self._any_call("arguments"))
                return f'calls: one{more}\none: {begin} "\\n" call "\\n" {end}\ncall: %json {call}'
        first, last = map(mark, FORMS[self.form].wrappers)
        ways, rules = [], [f"calls: {first} one{more} {last}"]
        for i, function in enumerate(self.functions):
            name, sep = json.dumps(f"{function.name}\n```json\n"), mark("<｜tool▁sep｜>")
            ways.append(f'{begin} "function" {sep} {name} arguments{i} "\\n```" {end}')
            rules.append(f"arguments{i}: %json {json.dumps(_parameters(function))}")
        return "\n".join([*rules, f"one: {' | '.join(ways)}"])

    def _any_call(self, key: str) -> dict[str, Any]:
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": function.name}, key: _parameters(function)},
                "required": ["name", key],
                "additionalProperties": False,
            }
            for function in self.functions
        ]
        return {"anyOf": calls}


def _parameters(function: Function) -> dict[str, Any]:
    return function.parameters or json.loads(ANY_OBJECT)


def composed(body: Grammar | None, calls: Calls | None, reasoning: bool | None, mark: Mark) -> Grammar | None:
    """A text of `body`, or calls, or whichever the model takes where both are given.

    `reasoning` comes first: true, what the prompt has opened; false, what the model may open; None, nothing.
    """
    ways = [*(["calls"] if calls else []), *(["@body"] if body else [])]
    if not ways or (body and not calls and reasoning is None):
        return body
    thought = {None: "", True: "thought ", False: f"({mark(THINK)} thought)? "}[reasoning]
    rules = [f"start: {thought}({' | '.join(ways)})"]
    if reasoning is not None:
        end = mark(THOUGHT)
        known = end.startswith("<[")
        rules.append(f"thought: text {end}\ntext: {_TEXT}" if known else f"thought[suffix={end}]: {_TEXT}")
    if calls:
        rules.append(calls.rules(mark))
    text = "\n".join(rules)
    return evolve(body, before=text) if body else Grammar.lark(text)


_TEXT = r"/(\n|.)*/"
