"""A core in a process of its own: `python -m sagellm.engine.process FD`, started by `ProcessLink`.

It speaks the messages of `CoreService` over the socket, and ends when the socket closes.
"""

from __future__ import annotations

import logging
import select
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress

from sagellm.engine.core import EngineCore
from sagellm.engine.link import CoreInfo, Message
from sagellm.engine.service import CoreService
from sagellm.engine.wire import pack, unpacker
from sagellm.errors import UserError


class Connection:
    def __init__(self, fd: int):
        self._socket = socket.socket(fileno=fd)
        self._unpacker = unpacker()

    def send(self, *message: object) -> None:
        self._socket.sendall(pack(message))

    def messages(self, *, wait: bool) -> Iterator[Message]:
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


def serve(connection: Connection) -> None:
    """Start a core as the first message says, then steps and answers until the socket closes."""
    ((_, config),) = connection.messages(wait=True)
    try:
        core = EngineCore(config, lambda *progress: connection.send("progress", *progress))
    except UserError as error:
        connection.send("refused", str(error))
        return
    info = CoreInfo.of(core)
    connection.send(
        "ready", info.model_id, str(info.folder), info.capability, info.kv_schema, info.vocab_size
    )
    service = CoreService(core)
    while True:
        for message in connection.messages(wait=not core.busy):
            for answer in service.handle(message):
                connection.send(*answer)
        if core.busy:
            connection.send("step", service.step())


def main() -> None:
    logging.basicConfig(format="sagellm core: %(levelname)s %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, ConnectionError):
        serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
