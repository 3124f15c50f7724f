"""Messages as bytes: msgpack, with arrays and our value classes as named maps. What is not named here cannot come."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from typing import Any

import attrs
import msgpack
import numpy as np

from sagellm.batch import Request, SamplingParams
from sagellm.config import EngineConfig
from sagellm.engine.events import Began, Failed, StepEvents
from sagellm.engine.stats import EngineStats
from sagellm.grammar import Grammar
from sagellm.rows import Rows, TreeRows
from sagellm.schemas import KVCacheSchema
from sagellm.target import CapabilityDescriptor

CLASSES = {
    kind.__name__: kind
    for kind in (
        Began,
        EngineConfig,
        EngineStats,
        Failed,
        Grammar,
        Request,
        Rows,
        SamplingParams,
        StepEvents,
        TreeRows,
    )
}
DOCUMENTS = {kind.__name__: kind for kind in (CapabilityDescriptor, KVCacheSchema)}
"""Those that have a document form of their own."""
LIMIT = 2**31 - 1
"""Bytes of one message."""


def pack(message: tuple[Any, ...]) -> bytes:
    return msgpack.packb(message, default=_encode, strict_types=True)


def unpacker() -> msgpack.Unpacker:
    """Feed it bytes as they come; iterate over whole messages."""
    return msgpack.Unpacker(object_hook=_decode, strict_map_key=False, max_buffer_size=LIMIT, raw=False)


class Connection:
    """Messages over a socket."""

    def __init__(self, fd: int):
        self._socket = socket.socket(fileno=fd)
        self._unpacker = unpacker()

    def send(self, *message: object) -> None:
        self._socket.sendall(pack(message))

    def messages(self, *, wait: bool) -> Iterator[list]:
        """What has come; with `wait`, at least one. Raises EOFError when the other side is gone."""
        while True:
            if wait or select.select([self._socket], [], [], 0)[0]:
                data = self._socket.recv(2**20)
                if not data:
                    raise EOFError
                self._unpacker.feed(data)
            some = list(self._unpacker)
            if some or not wait:
                yield from some
                return

    def close(self) -> None:
        self._socket.close()


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"!": "array", "dtype": value.dtype.str, "shape": list(value.shape), "data": value.tobytes()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (tuple, frozenset)):
        return list(value)
    if type(value).__name__ in DOCUMENTS:
        return {"!": type(value).__name__, "document": value.to_dict()}
    if type(value).__name__ in CLASSES:
        fields = {a.alias: getattr(value, a.name) for a in attrs.fields(type(value)) if a.init}
        return {"!": type(value).__name__} | fields
    return str(value)


def _decode(value: dict) -> Any:
    kind = value.pop("!", None)
    if kind is None:
        return value
    if kind == "array":
        return np.frombuffer(bytearray(value["data"]), value["dtype"]).reshape(value["shape"])
    if kind in DOCUMENTS:
        return DOCUMENTS[kind].from_dict(value["document"])
    return CLASSES[kind](**value)
