"""The other ranks of a tensor-parallel engine, each a process: `python -m sagellm.engine.ranks FD`.

The core is rank 0. It decides everything and draws; the others are told what to forward, as resolved columns, and
what happens to their KV cache, in order, over a socket each. Only collectives go from rank to rank. A rank that is
lost takes the core with it.
"""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sagellm.backends.base import KVCache
from sagellm.backends.comm import CommBackendProtocol, open_store
from sagellm.config import EngineConfig
from sagellm.engine.load import load_weights
from sagellm.engine.planner import Planner
from sagellm.engine.wire import Connection
from sagellm.errors import RankLost, UserError
from sagellm.host import processors
from sagellm.models.checkpoint import Checkpoint
from sagellm.rows import Rows

log = logging.getLogger(__name__)


class Ranks:
    """Ranks 1 to N - 1, and this process as rank 0."""

    def __init__(self, planner: Planner):
        self.size = planner.config.tensor_parallel
        self._store = open_store(self.size)
        self._connections: list[Connection] = []
        self.processes: list[subprocess.Popen] = []
        self._finalizer = weakref.finalize(self, _end, self._connections, self.processes)
        for _ in range(1, self.size):
            ours, theirs = socket.socketpair()
            with theirs:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "sagellm.engine.ranks", str(theirs.fileno())],
                        pass_fds=[theirs.fileno()],
                        stdin=subprocess.DEVNULL,
                    )
                )
            self._connections.append(Connection(ours.detach()))
        port, blocks = self._store.port, len(planner.kv.pool.references)
        with _starting():
            for rank, connection in enumerate(self._connections, 1):
                connection.send("start", planner.config, rank, blocks, port)
            self._answers("here")
            self.comm: CommBackendProtocol = planner.backend.make_comm(port, 0, self.size)

    def await_ready(self) -> None:
        """Wait until all ranks hold their weights."""
        with _starting():
            self._answers("ready")

    def close(self) -> None:
        self._finalizer()
        self.comm.close()

    def _send(self, *message: object) -> None:
        for rank, connection in enumerate(self._connections, 1):
            with _lost(rank):
                connection.send(*message)

    def _answers(self, wanted: str) -> list[Any]:
        """What every rank answers, from rank 1 on."""
        values = []
        for rank, connection in enumerate(self._connections, 1):
            with _lost(rank):
                (message,) = connection.messages(wait=True)
            match message:
                case ("refused", text):
                    raise UserError(f"rank {rank}: {text}")
                case (kind, value) if kind == wanted:
                    values.append(value)
        return values

    @contextmanager
    def forwarding(self, model: str, kinds: tuple[str, ...], rows: Rows) -> Iterator[CommBackendProtocol]:
        """All ranks run a function of the model on these rows; this one does inside. What fails ends all of them."""
        self._send("forward", model, kinds, rows)
        try:
            yield self.comm
        except RankLost:
            raise
        except Exception as error:
            log.exception("rank 0 failed")
            raise RankLost(f"rank 0 failed: {error}") from error

    # the KV cache

    def tell(self, method: str, *arguments: object) -> None:
        """Every rank's cache does this."""
        self._send("cache", method, arguments)

    def write(self, blocks: np.ndarray, parts: list[Tensor]) -> None:
        """Each rank's cache gets its part, from rank 1 on."""
        for rank, (connection, part) in enumerate(zip(self._connections, parts, strict=True), 1):
            with _lost(rank):
                connection.send("cache", "write", (blocks, _bytes(part)))

    def read(self, blocks: np.ndarray, like: Tensor) -> list[Tensor]:
        """Each rank's part of these blocks, from rank 1 on."""
        self._send("read", blocks)
        return [
            torch.from_numpy(values).view(like.dtype).reshape(like.shape)
            for values in self._answers("blocks")
        ]


class ShardedCache:
    """The KV cache of all ranks, as the executor knows one: read and written whole, each rank holding its heads.

    Emitted code gets rank 0's layers.
    """

    beside = None
    """What goes to host memory comes from all ranks, through their sockets."""

    def __init__(self, local: KVCache, ranks: Ranks, kv_heads: int):
        self._local, self._ranks, self._heads = local, ranks, kv_heads

    def __getitem__(self, layers):
        return self._local[layers]

    def clear(self, blocks: np.ndarray) -> None:
        self._ranks.tell("clear", blocks)
        self._local.clear(blocks)

    def copy(self, blocks: np.ndarray, copies: np.ndarray) -> None:
        self._ranks.tell("copy", blocks, copies)
        self._local.copy(blocks, copies)

    def move(self, slots: np.ndarray, places: np.ndarray) -> None:
        self._ranks.tell("move", slots, places)
        self._local.move(slots, places)

    def read(self, blocks: np.ndarray) -> Tensor:
        mine = self._local.read(blocks)
        parts = [mine, *self._ranks.read(blocks, mine)]
        count = self._heads // mine.shape[4]
        return torch.cat([parts[part * len(parts) // count] for part in range(count)], dim=4)

    def write(self, blocks: np.ndarray, values: Tensor) -> None:
        size = self._ranks.size
        count = min(self._heads, size)
        parts = values.chunk(count, dim=4)
        mine, *others = [parts[rank * count // size] for rank in range(size)]
        self._ranks.write(blocks, others)
        self._local.write(blocks, mine)


def share_cores(ranks: int) -> None:
    """Ranks on one machine take an equal part each of the processors that there are for them."""
    torch.set_num_threads(max(1, min(torch.get_num_threads(), processors() // ranks)))


def _bytes(values: Tensor) -> np.ndarray:
    return values.contiguous().view(torch.uint8).numpy()


@contextmanager
def _lost(rank: int) -> Iterator[None]:
    """A socket that closes means that its rank ended."""
    try:
        yield
    except (EOFError, OSError) as error:
        raise RankLost(f"rank {rank} ended") from error


@contextmanager
def _starting() -> Iterator[None]:
    try:
        yield
    except RankLost as error:
        raise UserError(f"the engine cannot start: {error}") from error


def _end(connections: list[Connection], processes: list[subprocess.Popen]) -> None:
    """Ranks end when their sockets close."""
    for connection in connections:
        connection.close()
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# a rank's own side


class _Rank:
    def __init__(self, config: EngineConfig, rank: int, blocks: int, port: int, connection: Connection):
        share_cores(config.tensor_parallel)
        self.planner = planner = Planner(config, blocks=blocks)
        connection.send("here", rank)
        self.comm = planner.backend.make_comm(port, rank, config.tensor_parallel)
        compiled = planner.rank_program()
        self.weights = load_weights(
            compiled.program,
            Checkpoint(planner.folder),
            planner.expected,
            rank=rank,
            ranks=config.tensor_parallel,
            device=planner.backend.capability.device,
        )
        self.cache = planner.backend.make_cache(planner.rank_schema, blocks)
        self._block = self.cache.read(np.zeros(1, np.int64))[0]
        connection.send("ready", rank)

    def forward(self, model: str, kinds: tuple[str, ...], rows: Rows) -> None:
        planner = self.planner
        function = planner.compiler.model(kinds, rows.forwarded).program[model]
        with torch.inference_mode():
            uploaded = planner.backend.upload(rows, planner.kv_schema.block_size)
            function(self.weights, self.cache, self.comm, uploaded)

    def do(self, method: str, arguments: list) -> None:
        if method == "write":
            blocks, values = arguments
            shape = (len(blocks), *self._block.shape)
            arguments = [blocks, torch.from_numpy(values).view(self._block.dtype).reshape(shape)]
        getattr(self.cache, method)(*arguments)


def serve(connection: Connection) -> None:
    """Do what the core says until the socket closes."""
    ((_, config, number, blocks, port),) = connection.messages(wait=True)
    try:
        rank = _Rank(config, number, blocks, port, connection)
    except UserError as error:
        connection.send("refused", str(error))
        return
    while True:
        for message in connection.messages(wait=True):
            match message:
                case ("forward", model, kinds, rows):
                    rank.forward(model, tuple(kinds), rows)
                case ("cache", method, arguments):
                    rank.do(method, arguments)
                case ("read", blocks):
                    connection.send("blocks", _bytes(rank.cache.read(blocks)))


def main() -> None:
    logging.basicConfig(format="sagellm rank: %(levelname)s %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, ConnectionError):
        try:
            serve(Connection(int(sys.argv[1])))
        except RankLost as error:
            sys.exit(f"sagellm rank: {error}")


if __name__ == "__main__":
    main()
