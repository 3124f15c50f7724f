"""What a model's text holds besides text: its reasoning, and calls of tools, in the forms of several families.

A parser takes the text as it comes, in any pieces, and gives the same parts for all ways to cut it.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from attrs import define, field, frozen


@frozen
class Part:
    """A piece of the answer: of its content, of its reasoning, or a whole call."""

    content: str = ""
    reasoning: str = ""
    call: dict[str, Any] | None = None
    """{"name": text, "arguments": JSON text}"""


Call = Callable[[str], dict[str, Any] | None]
"""What stands between two marks -> the call; None where it is none."""


@frozen
class Form:
    """How a family marks its calls."""

    begin: str
    end: str
    """Empty: the call goes on to the end of the text."""
    parse: Call
    wrappers: tuple[str, ...] = ()
    """Marks around all calls, which are dropped."""
    whole: bool = False
    """A text that begins with `begin` is a call; further on the mark is text."""


def _named(name: Any, arguments: Any) -> dict[str, Any] | None:
    if not isinstance(name, str) or not name:
        return None
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return {"name": name, "arguments": arguments}


def _json(text: str, arguments: str = "arguments") -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return _named(value.get("name"), value.get(arguments)) if isinstance(value, dict) else None


_DEEPSEEK = re.compile(r"\s*(?:function)?<｜tool▁sep｜>([^\n]+)\n```json\n(.*)\n```\s*", re.DOTALL)


def _deepseek(text: str) -> dict[str, Any] | None:
    found = _DEEPSEEK.fullmatch(text)
    return _named(found[1].strip(), found[2]) if found else None


FORMS = {
    "hermes": Form("<tool_call>", "</tool_call>", _json),
    "llama": Form("{", "", lambda text: _json("{" + text, "parameters"), whole=True),
    "deepseek": Form(
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        _deepseek,
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
}
"""Hermes is also Qwen's; Llama 3.1 and later; DeepSeek V3 and R1."""
THINK, THOUGHT = "<think>", "</think>"


def form_of(template: str) -> str | None:
    """Which form a chat template tells the model to use."""
    marks = {"hermes": "<tool_call>", "deepseek": "<｜tool▁call▁begin｜>", "llama": "<|python_tag|>"}
    return next((name for name, mark in marks.items() if mark in template), None)


@define
class Parser:
    """`push` text as it comes, `finish` at its end."""

    form: Form | None = None
    reasons: bool = False
    """Whether the model reasons between <think> and </think>."""
    thinking: bool = False
    """Whether the text begins in the middle of reasoning, as the template opened it."""
    calls: int = 0
    """Found so far."""
    most: int | None = None
    """Calls that are wanted; those behind are left out."""
    _held: str = ""
    _inside: bool = False
    """Of a call."""
    _begun: bool = False
    """Some content was shown."""
    _call: str = field(default="")

    def push(self, text: str) -> Iterator[Part]:
        self._held += text
        while self._held and not self._undecided:
            marks = self._marks()
            found = [(at, mark) for mark in marks if (at := self._held.find(mark)) >= 0]
            at, mark = min(found, default=(0, ""))
            if mark:
                yield from self._show(self._held[:at])
                self._held = self._held[at + len(mark) :]
                yield from self._pass(mark)
                continue
            keep = max((_overlap(self._held, mark) for mark in marks), default=0)
            shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            yield from self._show(shown)
            return

    def finish(self) -> Iterator[Part]:
        held, self._held = self._held, ""
        yield from self._show(held)
        if self._inside:
            yield from self._close("")

    @property
    def _undecided(self) -> bool:
        """Only blanks so far: a call of a `whole` form may come."""
        whole = self.form is not None and self.form.whole
        return whole and not (self._inside or self._begun or self.thinking) and self._held.isspace()

    def _marks(self) -> list[str]:
        """That matter here."""
        if self._inside:
            return [self.form.end] if self.form.end else []
        if self.thinking:
            return [THOUGHT]
        marks = [THINK] if self.reasons else []
        if self.form is None:
            return marks
        begins = not self._begun and self._held.lstrip().startswith(self.form.begin)
        return [*marks, self.form.begin, *self.form.wrappers] if begins or not self.form.whole else marks

    def _pass(self, mark: str) -> Iterator[Part]:
        if mark in (THINK, THOUGHT):
            self.thinking = mark == THINK
        elif self._inside:
            yield from self._close(mark)
        elif mark == self.form.begin:
            self._inside, self._call = True, ""

    def _show(self, text: str) -> Iterator[Part]:
        if not text:
            return
        if self._inside:
            self._call += text
        elif self.thinking:
            yield Part(reasoning=text)
        else:
            self._begun = self._begun or bool(text.strip())
            yield Part(content=text)

    def _close(self, mark: str) -> Iterator[Part]:
        """A call has ended; what turns out to be none is content."""
        call = self.form.parse(self._call.strip() if not self.form.whole else self._call)
        self._inside = False
        if call is None:
            self._begun = True
            yield Part(content=self.form.begin + self._call + mark)
            return
        if self.most is None or self.calls < self.most:
            self.calls += 1
            yield Part(call=call)


def _overlap(text: str, mark: str) -> int:
    """How many characters at the text's end begin the mark."""
    for count in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:count]):
            return count
    return 0


def tool_call(call: dict[str, Any], index: int | None = None) -> dict[str, Any]:
    """As the OpenAI API has it; chunks of a stream have an index."""
    more = {} if index is None else {"index": index}
    return more | {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": call}
