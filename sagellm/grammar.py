"""What an output must look like, as text that travels with a request. Compiled in `engine/grammars.py`. A leaf."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

from attrs import field, frozen

from sagellm import checks
from sagellm.errors import UserError

MAX_CHARACTERS = {
    "json": 128 * 1024,
    "regex": 16 * 1024,
    "choice": 64 * 1024,
    "lark": 256 * 1024,
    "gbnf": 16 * 1024,
}
"""Of a grammar's text, by its kind."""
MAX_NESTING = 64
"""Objects and lists inside one another, in a schema."""
MAX_CHOICES = 1024
MAX_RULES = 256
"""Of a GBNF, whose translation takes time by their square."""
ANY_OBJECT = '{"type": "object"}'


@frozen
class Grammar:
    """A language; an output of a request that has one is a text of it, or the beginning of one if it is cut off."""

    kind: str = field(validator=checks.one_of(MAX_CHARACTERS))
    text: str = field()
    before: str = field(default="", repr=False)
    """Lark rules whose `start` says where the language stands, as `@body`: behind a model's reasoning, say."""

    @classmethod
    def json(cls, schema: Mapping[str, Any] | bool | str = ANY_OBJECT) -> Self:
        """JSON that a schema describes; without one, any object."""
        if isinstance(schema, str):
            return cls("json", schema)
        try:
            return cls("json", json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"json is no JSON schema: {error}") from error

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """What this regular expression matches from beginning to end; no look-around, no references back."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Self:
        """One of these texts."""
        if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts):
            raise UserError("choice is no list of texts; accepted: a list of texts that are not empty")
        return cls("choice", json.dumps(list(texts)))

    @classmethod
    def lark(cls, text: str) -> Self:
        """A context-free grammar as Lark has them, of which the outputs are its rule `start`."""
        return cls("lark", text)

    @classmethod
    def gbnf(cls, text: str) -> Self:
        """One as llama.cpp has them, an EBNF of which the outputs are the rule `root`."""
        return cls("gbnf", text)

    @text.validator
    def _check_text(self, attribute, value) -> None:
        limit = MAX_CHARACTERS[self.kind]
        if not isinstance(value, str) or not 0 < len(value) <= limit:
            shown = f"{len(value)} characters" if isinstance(value, str) else reprlib.repr(value)
            raise UserError(f"{self.kind} is {shown}; accepted: a text of 1 to {limit} characters")
        if self.kind == "json":
            self._check_schema(_parsed(value))
        elif self.kind == "gbnf" and (rules := value.count("::=")) > MAX_RULES:
            raise UserError(f"gbnf has {rules} rules; accepted: at most {MAX_RULES}")
        elif self.kind == "choice":
            count = len(_parsed(value))
            if not 0 < count <= MAX_CHOICES:
                raise UserError(f"choice has {count} texts; accepted: 1 to {MAX_CHOICES}")

    @before.validator
    def _check_before(self, attribute, value) -> None:
        limit = MAX_CHARACTERS["lark"]
        if not isinstance(value, str) or len(value) > limit:
            raise UserError(
                f"before is {reprlib.repr(value)}; accepted: a text of at most {limit} characters"
            )

    @staticmethod
    def _check_schema(schema: Any) -> None:
        if not isinstance(schema, (dict, bool)):
            raise UserError(f"json is {type(schema).__name__}; accepted: a JSON schema, which is an object")
        level, depth = [schema], 0
        while level:
            if depth > MAX_NESTING:
                raise UserError(f"json is nested deeper than {MAX_NESTING}; accepted: a flatter schema")
            inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list)))
            level, depth = [value for values in inner for value in values], depth + 1


def as_grammar(value: Any) -> Any:
    """{kind: what its constructor takes} as the grammar, as files have it; anything else as it is."""
    if isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in MAX_CHARACTERS:
        ((kind, text),) = value.items()
        return getattr(Grammar, kind)(text)
    return value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"json is no valid JSON: {error}") from error
