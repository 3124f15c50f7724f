"""A core in a process of its own: `python -m sagellm.engine.process FD`, started by `ProcessLink`.

It speaks the messages of `CoreService` over the socket, and ends when the socket closes.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
from contextlib import suppress

from sagellm.engine.core import EngineCore
from sagellm.engine.link import CoreInfo
from sagellm.engine.service import CoreService
from sagellm.engine.wire import Connection
from sagellm.errors import RankLost, UserError


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
        "ready",
        info.model_id,
        str(info.folder),
        info.capability,
        info.kv_schema,
        info.vocab_size,
        info.hidden_size,
    )
    gc.collect()
    gc.freeze()  # what is there stays; else every collection of a step's graph would walk over it
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
        try:
            serve(Connection(int(sys.argv[1])))
        except RankLost as error:
            sys.exit(f"sagellm core: {error}")


if __name__ == "__main__":
    main()
