"""Which tokens a row's grammar allows: llguidance's matchers, compiled with bounds and moved on with the output.

A row's allowed tokens are a column, so that a step needs nothing else. A matcher is a function of the grammar and the
output so far: where there is none for a row (it begins, was put back, or its core was lost) it reads the output again.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from threading import Lock

import llguidance as ll
import numpy as np
from attrs import frozen
from llguidance.gbnf_to_lark import gbnf_to_lark
from llguidance.numpy import fill_next_token_bitmask

from sagellm.batch import Columns
from sagellm.engine.chat_template import one_line
from sagellm.engine.tokenizer import Tokenizer
from sagellm.errors import UserError
from sagellm.grammar import Grammar

MAX_SECONDS = 0.5
"""Of this processor's time that a grammar may take to compile; llguidance's own limits end it soon after."""
KEPT = 64
"""Compiled grammars."""
SPACE = r"( |\n[ \t]{0,40})?"
"""Between the parts of a JSON text: a blank, or a new line with its indentation. Else some write blanks for ever."""


FAILED = "the grammar failed"
"""How errors begin of requests whose grammar compiles and is too much for the matcher, in a step."""


class GrammarError(Exception):
    """A grammar that compiles, and then is too much for the matcher."""


class Grammars:
    """Compiles grammars for one tokenizer. Safe in threads; one is compiled at a time."""

    def __init__(self, tokenizer: Callable[[], Tokenizer] | None, vocab_size: int, end_tokens: Iterable[int]):
        """The tokenizer is asked for with the first grammar; None: the model has none."""
        self._tokenizer, self._vocab_size, self.end_tokens = tokenizer, vocab_size, tuple(end_tokens)
        self._known: OrderedDict[Grammar, ll.LLMatcher] = OrderedDict()
        self._vocabulary: ll.LLTokenizer | None = None
        self._lock = Lock()
        self._limits = ll.LLParserLimits(
            max_lexer_states=50_000, max_grammar_size=100_000, verbose_errors=False
        )

    @property
    def words(self) -> int:
        """Numbers of 32 bits that hold one for each token."""
        return -(-self._vocab_size // 32)

    def matcher(self, grammar: Grammar) -> ll.LLMatcher:
        """A new one, at the beginning of an output. Raises UserError where the grammar is wrong or costs too much."""
        with self._lock:
            found = self._known.get(grammar)
            if found is None:
                found = self._known[grammar] = self._compiled(grammar)
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
            self._known.move_to_end(grammar)
            return found.deep_copy()

    def ended(self, grammar: Grammar, output: list[int], ends: Iterable[int]) -> bool:
        """Whether nothing can follow but these and the model's end tokens. UserError for what is not of the grammar."""
        matcher = self.matcher(grammar)
        if not matcher.consume_tokens(output):
            raise UserError("resume is not of the grammar; accepted: the beginning of an output that is")
        allowed = np.full((1, self.words), -1, np.int32)
        fill_next_token_bitmask(matcher, allowed, 0)
        return not _without(allowed[0], {*self.end_tokens, *ends}).any()

    def _compiled(self, grammar: Grammar) -> ll.LLMatcher:
        if self._vocabulary is None:
            self._vocabulary = self._read_vocabulary()
        began = time.thread_time()
        source = _source(grammar)
        matcher = ll.LLMatcher(self._vocabulary, source, log_level=0, limits=self._limits)
        took = time.thread_time() - began
        if matcher.is_error():
            raise UserError(f"{grammar.kind} cannot be compiled: {_reason(matcher.get_error())}")
        if took > MAX_SECONDS:
            raise UserError(
                f"{grammar.kind} takes {took:.1f} s to compile; accepted: what takes at most {MAX_SECONDS:g} s"
            )
        return matcher

    def _read_vocabulary(self) -> ll.LLTokenizer:
        if self._tokenizer is None:
            raise UserError(
                "a grammar for a model without tokenizer.json; accepted: outputs without a grammar"
            )
        ends = list(self.end_tokens) or None
        return ll.LLTokenizer(self._tokenizer().to_json(), n_vocab=self._vocab_size, eos_token=ends)


def _without(allowed: np.ndarray, tokens: Iterable[int]) -> np.ndarray:
    """A row of allowed tokens, less these."""
    rest = allowed.copy()
    for token in tokens:
        rest[token >> 5] &= ~np.uint32(1 << (token & 31)).view(np.int32)
    return rest


def _source(grammar: Grammar) -> str:
    """As llguidance reads it."""
    match grammar.kind:
        case "json":
            text = ll.LLMatcher.grammar_from_json_schema(grammar.text, {"whitespace_pattern": SPACE})
            (body,) = json.loads(text)["grammars"]
        case "regex":
            (body,) = json.loads(ll.LLMatcher.grammar_from_regex(grammar.text))["grammars"]
        case "choice":
            texts = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(grammar.text))
            body = {"lark_grammar": "start: " + " | ".join(texts)}
        case "gbnf":
            try:
                body = {"lark_grammar": gbnf_to_lark(grammar.text)}
            except Exception as error:  # it raises whatever it stumbles over
                raise UserError(f"gbnf is no grammar: {one_line(error)}") from error
        case _:
            body = {"lark_grammar": grammar.text}
    before = [{"lark_grammar": grammar.before}] if grammar.before else []
    return json.dumps({"grammars": [*before, body | {"name": "body"}]})


def _reason(text: str) -> str:
    return one_line(ValueError(text.split("\n<non-verbose/>")[0]), 300)


@frozen
class _State:
    number: int
    sample: int
    matcher: ll.LLMatcher


class RowGrammars:
    """The matchers of running rows, and the column `allowed`."""

    def __init__(self, columns: Columns, grammars: Grammars):
        self._columns, self.grammars = columns, grammars
        self._states: dict[int, _State] = {}

    def prepare(self, rows: Iterable[int], grammar_of: Callable[[int], Grammar]) -> None:
        """See to it that `allowed` is right for rows whose sequence began or went on. Raises GrammarError."""
        c = self._columns
        if not c.allowed.shape[1]:
            c.allowed = np.full((c.capacity, self.grammars.words), -1, np.int32)
        for row in rows:
            state = self._states.get(row)
            if state is not None and (state.number, state.sample) == (c.number[row], c.sample[row]):
                continue
            matcher = self.grammars.matcher(grammar_of(row))
            if not matcher.consume_tokens(c.tokens[row, c.prompt[row] : c.length[row]].tolist()):
                raise GrammarError(f"{FAILED} on its own output: {_reason(matcher.get_error())}")
            self._states[row] = _State(int(c.number[row]), int(c.sample[row]), matcher)
            if why := self._fill(row):
                raise GrammarError(why)

    def advance(self, row: int, token: int) -> tuple[bool, str]:
        """The row got a token: whether nothing may follow it, and what went wrong, if something did."""
        c, matcher = self._columns, self._states[row].matcher
        matcher.consume_token(token)
        why = self._fill(row)
        ends = set(self.grammars.end_tokens)
        if c.length[row] < c.minimum[row]:
            ends |= {token for token in c.stops[row].tolist() if token >= 0}
        return not _without(c.allowed[row], ends).any(), why

    def _fill(self, row: int) -> str:
        """Write what may come next; what is wrong with it."""
        matcher = self._states[row].matcher
        fill_next_token_bitmask(matcher, self._columns.allowed, row)
        return f"{FAILED}: {_reason(matcher.get_error())}" if matcher.is_error() else ""

    def forget(self, row: int) -> None:
        self._states.pop(row, None)
