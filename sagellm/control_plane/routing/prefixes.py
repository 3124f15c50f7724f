"""Which engine has seen which beginnings: prompts as chained hashes, and a table of who was sent them.

It is a guess at what is in the engines' caches, made from what was sent; nothing is asked of them. Hashes are
Python's own, so they mean something in this process alone.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import inf
from typing import Any, NamedTuple

import numpy as np

CHUNK = 64
"""Tokens of a chunk."""
BYTES = 4
"""Of UTF-8 that make a token, about: English text and code have 3 to 5, Chinese 4 to 5."""
MOST_BYTES = 8
"""A prompt is hardly ever longer than this many bytes a token."""
ID_BYTES = 8
"""Of a token id."""
MOST_CHUNKS = 4096
"""What is behind them, beyond 256 k tokens, is not looked at."""
DEFAULT_CHUNKS = 16384
"""Remembered of an engine that does not tell how much its cache holds."""


class Prompt(NamedTuple):
    """What is known of a prompt before any engine read it."""

    chunks: tuple[int, ...]
    tokens: int
    """Estimated, unless it came as token ids."""
    least: int
    """It has at least so many."""


def chunks_of(path: str, body: Mapping[str, Any]) -> tuple[int, ...]:
    """A hash for each full chunk of the prompt, that covers all chunks before it, the model and the salt: 256 bytes of
    text or 64 token ids. Of several prompts the first counts; texts to embed have none, as engines do not look
    them up."""
    return read_prompt(path, body).chunks


def read_prompt(path: str, body: Mapping[str, Any]) -> Prompt:
    """Tokens are of all prompts of the request together; of texts to embed, of the longest, as each is a sequence of
    its own. Whatever clients send instead of a prompt is taken as text: engines refuse it better."""
    if path == "/v1/embeddings":
        data = [_data(each) for each in _each(body.get("input"))]
        tokens, least = max(map(_size, data), default=(1, 1))
        return Prompt((), max(1, tokens), max(1, least))
    if path == "/v1/chat/completions":
        tools, messages = body.get("tools"), body.get("messages") or ()
        texts = [_text_of(message) for message in messages] if isinstance(messages, list) else []
        data = [_data("".join([str(tools), *texts] if tools else texts))]
    else:
        data = [_data(each) for each in _each(body.get("prompt"))]
    root = hash((path, str(body.get("model")), str(body.get("cache_salt"))))
    tokens = least = 0
    for each in data:
        more, at_least = _size(each)
        tokens, least = tokens + more, least + at_least
    return Prompt(_chain(root, *data[0]) if data else (), tokens or 1, least or 1)


def _text_of(message: Any) -> str:
    if not isinstance(message, dict):
        return f"{message}\0"
    rest = message.get("tool_calls") or message.get("tool_call_id") or ""
    return f"{message.get('role')}\0{message.get('content')}\0{rest}\0"


def _each(given: Any) -> Sequence[Any]:
    """A text, token ids, or several of them, as several."""
    if not given:
        return ()
    return given if isinstance(given, list) and not isinstance(given[0], int) else [given]


def _data(prompt: Any) -> tuple[bytes, int]:
    """As bytes, and how many of them make a token."""
    if isinstance(prompt, list):
        try:
            return array("q", prompt).tobytes(), ID_BYTES
        except (TypeError, OverflowError):
            pass
    return str(prompt).encode(errors="surrogatepass"), BYTES


def _size(of: tuple[bytes, int]) -> tuple[int, int]:
    data, width = of
    tokens = -(-len(data) // width)
    return tokens, tokens if width == ID_BYTES else len(data) // MOST_BYTES


def _chain(root: int, data: bytes, width: int) -> tuple[int, ...]:
    chunks, width = [], CHUNK * width
    for at in range(0, min(len(data), MOST_CHUNKS * width) - width + 1, width):
        root = hash((root, data[at : at + width]))
        chunks.append(root)
    return tuple(chunks)


@lru_cache(4096)
def _bits(mask: int, rows: int) -> np.ndarray:
    """float64 [rows] of 0 and 1; not to be written."""
    data = np.frombuffer(mask.to_bytes(-(-rows // 8), "little"), np.uint8)
    return np.unpackbits(data, count=rows, bitorder="little").astype(np.float64)


def _deeper(found: np.ndarray | None, mask: int, depth: float, rows: int) -> np.ndarray:
    if not depth:
        return np.zeros(rows)
    here = _bits(mask, rows) * float(depth)
    return here if found is None else np.maximum(found, here)


class PrefixTable:
    """For each chunk the rows of the engines that were sent it, as the bits of an int; for each row its chunks, those
    sent longest ago first to be forgotten."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._seen: dict[int, OrderedDict[int, None]] = {}
        self._most: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def bound(self, row: int, chunks: int | None) -> None:
        """Remember so many chunks of this row; None: `DEFAULT_CHUNKS`."""
        self._most[row] = DEFAULT_CHUNKS if chunks is None else chunks

    def match(self, chunks: Sequence[int], rows: int, unit: float = 1.0, most: float = inf) -> np.ndarray:
        """float64 [rows]: with how many of these chunks, from the first on, each row is familiar; each counts as
        `unit`, and all together as `most` at most."""
        known, mask, depth, found = self._rows, -1, 0, None
        for chunk in chunks:
            left = known.get(chunk, 0) & mask
            if left != mask:
                found = _deeper(found, mask, min(depth * unit, most), rows)
                if not left:
                    return found
                mask = left
            depth += 1
        return _deeper(found, mask, min(depth * unit, most), rows)

    def depth(self, row: int, chunks: Sequence[int]) -> int:
        """As `match`, of one row."""
        seen = self._seen.get(row)
        if not seen:
            return 0
        return next((depth for depth, chunk in enumerate(chunks) if chunk not in seen), len(chunks))

    def saw(self, row: int, chunks: Sequence[int]) -> None:
        """These were sent to the row."""
        seen = self._seen.setdefault(row, OrderedDict())
        known, bit = self._rows, 1 << row
        # from the end, so that a beginning is never forgotten before what follows it
        for chunk in reversed(chunks):
            if chunk in seen:
                seen.move_to_end(chunk)
            else:
                seen[chunk] = None
                known[chunk] = known.get(chunk, 0) | bit
        for _ in range(len(seen) - self._most.get(row, DEFAULT_CHUNKS)):
            self._drop(seen.popitem(last=False)[0], bit)

    def forget(self, row: int) -> None:
        """All of a row: its engine is gone, or its cache is."""
        for chunk in self._seen.pop(row, ()):
            self._drop(chunk, 1 << row)

    def _drop(self, chunk: int, bit: int) -> None:
        left = self._rows[chunk] & ~bit
        if left:
            self._rows[chunk] = left
        else:
            del self._rows[chunk]
