"""How a front reaches its core: in the same process, or in one of its own over a local socket."""

from __future__ import annotations

import queue
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from sagellm.config import EngineConfig
from sagellm.engine.load import Progress
from sagellm.engine.wire import pack, unpacker
from sagellm.errors import RankLost, UserError
from sagellm.schemas import KVCacheSchema
from sagellm.target import CapabilityDescriptor

if TYPE_CHECKING:
    from sagellm.engine.core import EngineCore

Message = tuple[Any, ...] | list
"""See `CoreService`."""


class CoreLost(Exception):
    """The core ended without being asked to."""


@frozen
class CoreInfo:
    """What a front has to know of its core."""

    model_id: str
    folder: Path
    capability: CapabilityDescriptor
    """With the limits of this model and its cache."""
    kv_schema: KVCacheSchema
    vocab_size: int
    hidden_size: int

    @classmethod
    def of(cls, core: EngineCore) -> CoreInfo:
        columns = core.columns
        limits = {
            "max_batch_size": columns.capacity,
            "max_sequence_length": columns.max_length,
            "kv_cache_capacity": core.kv.pool.total * columns.block_size,
        }
        capability = evolve(core.backend.capability, **limits)
        return cls(
            core.model.name,
            core.folder,
            capability,
            core.kv_schema,
            core.model.vocab_size,
            core.model.hidden_size,
        )


class Link(ABC):
    """Both ways between a front and a core. `send` may be called from any thread, `receive` from one."""

    info: CoreInfo

    @abstractmethod
    def send(self, message: Message) -> None:
        """Without waiting for an answer. A message to a core that is lost is lost with it."""

    @abstractmethod
    def receive(self) -> list[Message]:
        """Wait for what the core has to say; [] once the link is closed. Raises CoreLost."""

    @abstractmethod
    def close(self) -> None: ...


class InlineLink(Link):
    """The core in this process: it takes its steps inside `receive`."""

    def __init__(self, config: EngineConfig, progress: Progress | None = None):
        from sagellm.engine.core import EngineCore
        from sagellm.engine.service import CoreService

        self.core = EngineCore(config, progress)
        self.info = CoreInfo.of(self.core)
        self._service = CoreService(self.core)
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()

    def send(self, message: Message) -> None:
        self._messages.put(message)

    def receive(self) -> list[Message]:
        try:
            return self._advance()
        except RankLost as error:
            self.core.close()
            raise CoreLost(str(error)) from error

    def _advance(self) -> list[Message]:
        answers: list[Message] = []
        while not answers:
            while not self._messages.empty() or not self.core.busy:
                message = self._messages.get()
                if message is None:
                    self.core.close()
                    return []
                answers += self._service.handle(message)
                if answers and not self.core.busy:
                    return answers
            answers.append(("step", self._service.step()))
        return answers

    def close(self) -> None:
        self._messages.put(None)


class ProcessLink(Link):
    """The core in a process of its own. It ends with this process: its socket closes."""

    def __init__(self, config: EngineConfig, progress: Progress | None = None):
        ours, theirs = socket.socketpair()
        self._socket, self._lock, self._unpacker = ours, Lock(), unpacker()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sagellm.engine.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._closing = False
        self.send(("start", config))
        self.info = self._await_info(progress)

    def _await_info(self, progress: Progress | None) -> CoreInfo:
        while True:
            try:
                messages = self.receive()
            except CoreLost as error:
                raise UserError(f"the core ended while it started ({error})") from error
            for message in messages:
                match message:
                    case ("progress", what, done, of) if progress:
                        progress(what, done, of)
                    case ("refused", text):
                        self.process.wait()
                        raise UserError(text)
                    case ("ready", model_id, folder, *rest):
                        return CoreInfo(model_id, Path(folder), *rest)

    def send(self, message: Message) -> None:
        data = pack(message)
        with suppress(OSError), self._lock:
            self._socket.sendall(data)

    def receive(self) -> list[Message]:
        while True:
            messages = list(self._unpacker)
            if messages:
                return messages
            try:
                data = self._socket.recv(2**20)
            except OSError:
                data = b""
            if not data:
                if self._closing:
                    return []
                raise CoreLost(_how_it_ended(self.process.wait()))
            self._unpacker.feed(data)

    def close(self) -> None:
        self._closing = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._socket.close()


def _how_it_ended(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"


LINKS: dict[str, Callable[..., Link]] = {"inline": InlineLink, "process": ProcessLink}
