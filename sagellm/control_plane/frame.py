"""Most chunks of a stream differ in their text and token ids alone: these are found without reading the rest again."""

from __future__ import annotations

from typing import Any, Self

from attrs import Factory, field, frozen
from pydantic_core import from_json, to_json

IDS = b'"token_ids":'


@frozen(eq=False)
class Frame:
    """The bytes of a chunk around its text and its token ids, and around its text as the client gets it."""

    before: bytes
    between: bytes
    after: bytes
    lead: bytes
    tail: bytes
    _text_from: int = field(init=False, default=Factory(lambda self: len(self.before), takes_self=True))
    _ids_until: int = field(init=False, default=Factory(lambda self: -len(self.after), takes_self=True))

    @classmethod
    def of(cls, chunk: bytes, passed_on: bytes, text: str, ids: list[int]) -> Self | None:
        """Of a chunk that has this text and these ids; None where they cannot be told from the rest."""
        quoted, listed = to_json(text), IDS + to_json(ids)
        if not chunk.count(quoted) == chunk.count(listed) == passed_on.count(quoted) == 1:
            return None
        at, told, ids_at = chunk.index(quoted), passed_on.index(quoted), chunk.index(listed)
        if ids_at < at:
            return None
        past = len(quoted) - 1  # from one quotation mark to the other
        found = cls(
            before=chunk[: at + 1],
            between=chunk[at + past : ids_at + len(IDS) + 1],
            after=chunk[ids_at + len(listed) - 1 :],
            lead=passed_on[: told + 1],
            tail=passed_on[told + past :],
        )
        return found if found._holds() else None

    def _holds(self) -> bool:
        """Whether another text and another id come out where they were put in."""
        try:
            (choice,) = from_json(self.before + b"@" + self.between + b"7" + self.after)["choices"]
            (told,) = from_json(self.lead + b"@" + self.tail)["choices"]
        except ValueError:
            return False
        return choice.get("token_ids") == [7] and _text(choice) == _text(told) == "@"

    def read(self, chunk: bytes) -> tuple[bytes, list[int]] | None:
        """The chunk for the client, empty where it has no text, and its token ids. None: it may differ in more."""
        if not (chunk.startswith(self.before) and chunk.endswith(self.after)):
            return None
        text, found, ids = chunk[self._text_from : self._ids_until].partition(self.between)
        if not found or b'"' in text or b"\\" in text:
            return None
        try:
            made = list(map(int, ids.split(b",")))
        except ValueError:
            return None
        return self.lead + text + self.tail if text else b"", made


def _text(choice: dict[str, Any]) -> str | None:
    return choice["delta"].get("content") if choice.get("delta") else choice.get("text")
