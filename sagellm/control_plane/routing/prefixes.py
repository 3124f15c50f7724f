"""Which engine has seen which beginnings: prompts as chained hashes, and a table of who was sent them.

It is a guess at what is in the engines' caches, made from what was sent; nothing is asked of them. Hashes are
Python's own, so they mean something in this process alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

CHUNK = 64
"""Tokens of a chunk."""
BYTES = 4
"""Of UTF-8 that make a token, about: English text and code have 3 to 5, Chinese 4 to 5."""
MOST_BYTES = 8
"""A prompt is hardly ever longer than this many bytes a token."""
DEFAULT_CHUNKS = 16384
"""Remembered of an engine that does not tell how much its cache holds."""


class Size(NamedTuple):
    """How long a prompt is."""

    tokens: int
    """Estimated, unless it came as token ids."""
    least: int


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    rest = message.get("tool_calls") or message.get("tool_call_id")
    text = content if isinstance(content, str) else str(content)
    return f"{message.get('role')}\0{text}\0{rest or ''}\0"


def _first(path: str, body: Mapping[str, Any]) -> str | Sequence[int]:
    """What an engine's cache would be looked up by: a conversation, or the first of the prompts."""
    if path == "/v1/chat/completions":
        tools = body.get("tools")
        messages = "".join([_text_of(message) for message in body.get("messages") or ()])
        return f"{tools}\0{messages}" if tools else messages
    prompt = body.get("prompt") or ""
    return prompt[0] if isinstance(prompt, list) and not isinstance(prompt[0], int) else prompt


def chunks_of(path: str, body: Mapping[str, Any]) -> tuple[int, ...]:
    """A hash for each full chunk of the prompt, that covers all chunks before it, the model and the salt: 256 bytes of
    text or 64 token ids. Of several prompts the first counts; texts to embed have none, as engines do not look
    them up."""
    if path == "/v1/embeddings":
        return ()
    root = hash((path, body.get("model"), body.get("cache_salt")))
    prompt = _first(path, body)
    pieces: Iterable[Any]
    if isinstance(prompt, str):
        data, width = prompt.encode(errors="surrogatepass"), CHUNK * BYTES
        pieces = [data[at : at + width] for at in range(0, len(data) - width + 1, width)]
    else:
        pieces = [tuple(prompt[at : at + CHUNK]) for at in range(0, len(prompt) - CHUNK + 1, CHUNK)]
    return tuple(accumulate(pieces, lambda before, piece: hash((before, piece)), initial=root))[1:]


def size_of(path: str, body: Mapping[str, Any]) -> Size:
    """Of all prompts of a request together; of texts to embed, the longest, as each is a sequence of its own."""
    if path == "/v1/chat/completions":
        return _sum([_one(_first(path, body))])
    given = body.get("input" if path == "/v1/embeddings" else "prompt") or ""
    several = isinstance(given, list) and not isinstance(given[0], int)
    sizes = [_one(each) for each in (given if several else [given])]
    return max(sizes) if path == "/v1/embeddings" else _sum(sizes)


def _one(prompt: str | Sequence[int]) -> Size:
    if not isinstance(prompt, str):
        return Size(len(prompt), len(prompt))
    count = len(prompt.encode(errors="surrogatepass"))
    return Size(-(-count // BYTES), count // MOST_BYTES)


def _sum(sizes: Sequence[Size]) -> Size:
    return Size(max(1, sum(size.tokens for size in sizes)), max(1, sum(size.least for size in sizes)))


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

    def match(self, chunks: Sequence[int], rows: int) -> np.ndarray:
        """int64 [rows]: with how many of these chunks, from the first on, each row is familiar."""
        masks: list[int] = []
        depths: list[int] = []
        known, mask = self._rows, -1
        for depth, chunk in enumerate(chunks):
            left = known.get(chunk, 0) & mask
            if left != mask:
                if depth:
                    masks.append(mask)
                    depths.append(depth)
                if not left:
                    break
                mask = left
        else:
            if chunks:
                masks.append(mask)
                depths.append(len(chunks))
        if not masks:
            return np.zeros(rows, np.int64)
        # masks shrink: a row's depth is where it is last seen
        width = -(-rows // 8)
        data = np.frombuffer(b"".join([mask.to_bytes(width, "little") for mask in masks]), np.uint8)
        bits = np.unpackbits(data.reshape(len(masks), width), axis=1, count=rows, bitorder="little")
        return (bits * np.array(depths)[:, None]).max(axis=0)

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
