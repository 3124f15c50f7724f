"""Tokens to text as they come, never half a character and never part of a stop string.

All text shown equals `Tokenizer.decode` of all the ids or, where a stop string is met, of the ids that complete it,
cut before it. The cost of a token does not grow with the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol

from sagellm.engine.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_INCOMPLETE = 8
"""Text that ends in U+FFFD waits for this many tokens at most; a character takes four at most."""


class Detokenizer:
    """The text of one sequence.

    `push` gives the text that a token completes, `finish` what is left at the end. Once a stop string is met,
    `stopped` names it and nothing more is shown. What the first `min_tokens` tokens complete is not looked at.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self.stopped: str | None = None
        self._exempt = min_tokens + 1
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stream: _Stream
        self._stream = (
            _ByteStream(tokenizer) if tokenizer.byte_level else _PieceStream(tokenizer, self._longest)
        )
        self._held = ""
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        """All text shown so far."""
        return "".join(self._shown)

    def push(self, token_id: int) -> str:
        self._exempt -= 1
        if self.stopped is not None or token_id in self._hidden:
            return ""
        text = self._stream.push(token_id)
        if (
            self._exempt <= 0
            and self._stream.tentative
            and (self._held + self._stream.tentative).endswith(self._stop)
        ):
            text = self._stream.finish()
        return self._show(text)

    def finish(self) -> str:
        if self.stopped is not None:
            return ""
        return self._show(self._stream.finish(), last=True)

    def _show(self, text: str, last: bool = False) -> str:
        if not self._stop or self._exempt > 0:
            self._shown.append(text)
            return text
        text = self._held + text
        found = ((text.find(stop), stop) for stop in self._stop)
        met = min(((start + len(stop), start, stop) for start, stop in found if start >= 0), default=None)
        if met is not None:
            _, shown, self.stopped = met
        else:
            shown = len(text) if last else len(text) - self._overlap(text)
        self._held = text[shown:]
        self._shown.append(text[:shown])
        return text[:shown]

    def _overlap(self, text: str) -> int:
        """How many characters at the end of the text may begin a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


class _Stream(Protocol):
    """Ids to text, where what is given is never taken back."""

    tentative: str
    """The end of the text that the ids make but that a later one may still change."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _ByteStream:
    """Where every token is bytes, text is their UTF-8; only an incomplete character waits."""

    tentative = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes: Callable[[int], bytes | None] = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _PieceStream:
    """Where tokens are text, each is decoded behind the piece before it, which settles its leading space.

    A run of byte tokens (`<0xE4>`) is valid or not as a whole: with one bad byte each shows as U+FFFD. So a run
    waits for its end, and its text meanwhile, if valid, is tentative.
    """

    def __init__(self, tokenizer: Tokenizer, tail: int) -> None:
        """`tail` is how many characters of tentative text to keep, as long as the longest stop string."""
        self.tentative = ""
        self._tokenizer = tokenizer
        self._tail = tail
        self._context = ""
        self._context_length = 0
        self._ids: list[int] = []
        self._begin_run()

    def push(self, token_id: int) -> str:
        byte = self._tokenizer.token_bytes(token_id)
        if byte == b"":  # outside the vocabulary
            return ""
        self._ids.append(token_id)
        if byte is None:
            return self._decode()
        self._extend_run(byte)
        return ""

    def finish(self) -> str:
        return self._decode(last=True)

    def _decode(self, last: bool = False) -> str:
        self._begin_run()
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        if len(whole) <= len(self._context):
            return ""
        waiting = len(self._ids) - self._context_length
        if whole.endswith(_REPLACEMENT) and waiting < _MAX_INCOMPLETE and not last:
            return ""
        text = whole[len(self._context) :]
        del self._ids[: self._context_length]
        self._context = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        self._context_length = len(self._ids)
        return text

    def _begin_run(self) -> None:
        self.tentative = ""
        self._valid = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    def _extend_run(self, byte: bytes) -> None:
        if not self._valid or not self._tail:
            return
        try:
            self.tentative = (self.tentative + self._utf8.decode(byte))[-self._tail :]
        except UnicodeDecodeError:
            self._valid, self.tentative = False, ""
