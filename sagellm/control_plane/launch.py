"""Where a server's process runs: here, or wherever another launcher puts it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


class Launched(ABC):
    """A process that was started."""

    pid: int

    @abstractmethod
    def status(self) -> int | None:
        """Its exit status; None while it runs."""

    @abstractmethod
    async def stop(self, grace_s: float) -> None:
        """Ask it to end, and end it when it has not within so many seconds."""

    @abstractmethod
    async def tail(self, lines: int) -> list[str]:
        """The last lines it said."""


class Place(ABC):
    """A machine on which one server is to run."""

    host: str
    """Where it can be reached from here."""

    @abstractmethod
    async def free_port(self) -> int: ...

    @abstractmethod
    async def launch(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> Launched:
        """Start it; what it says goes to the file `log`. Raises FileNotFoundError where there is no such program."""


class Launcher(ABC):
    """Finds places for servers."""

    @abstractmethod
    async def place(self, device: str | None, ranks: int) -> Place:
        """A machine that has so many of these devices free. Raises UserError where there is none."""

    @abstractmethod
    def adopt(self, pid: int, port: int, log: Path) -> Launched | None:
        """A process that an earlier launcher of this kind had started for a server on this port, if it goes on."""


class LocalProcess(Launched):
    """A process of this machine, the head of a group of its own, so that its children end with it."""

    def __init__(self, pid: int, log: Path, child: asyncio.subprocess.Process | None = None):
        self.pid, self._log, self._child = pid, log, child

    def status(self) -> int | None:
        if self._child is not None:
            return self._child.returncode
        return None if _runs(self.pid) else -1

    async def stop(self, grace_s: float) -> None:
        for how, seconds in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, how)
            limit = time.monotonic() + seconds
            while self.status() is None and time.monotonic() < limit:
                await asyncio.sleep(0.05)
            if self.status() is not None:
                return

    async def tail(self, lines: int) -> list[str]:
        try:
            with self._log.open(encoding="utf-8", errors="replace") as file:
                return [line.rstrip("\n") for line in deque(file, lines)]
        except FileNotFoundError:
            return []


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class LocalLauncher(Launcher, Place):
    """This machine, whatever the device: engines say themselves what they lack."""

    host = "127.0.0.1"

    async def place(self, device, ranks) -> Place:
        return self

    async def launch(self, command, env, log) -> Launched:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                *command,
                env={**os.environ, **env},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        return LocalProcess(process.pid, log, process)

    def adopt(self, pid, port, log) -> Launched | None:
        try:  # the number may be another process's by now
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return None
        return LocalProcess(pid, log) if str(port).encode() in words else None

    async def free_port(self) -> int:
        with socket.socket() as found:
            found.bind((self.host, 0))
            return found.getsockname()[1]


def launcher(cluster: str | None) -> Launcher:
    """Of this machine, or of a Ray cluster at this address (`auto`: the one that this machine belongs to)."""
    if cluster is None:
        return LocalLauncher()
    from sagellm.control_plane.ray_launch import RayLauncher

    return RayLauncher(cluster)
