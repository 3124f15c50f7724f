"""Where a server's process runs: here, or wherever another launcher puts it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


class Launched(ABC):
    """A process that was started."""

    pid: int

    @abstractmethod
    async def wait(self) -> int:
        """Its exit status, once it has ended."""

    @abstractmethod
    async def stop(self, grace_s: float) -> None:
        """Ask it to end, and end it when it has not within so many seconds."""

    @abstractmethod
    async def tail(self, lines: int) -> list[str]:
        """The last lines it said."""


class Launcher(ABC):
    host: str
    """Where the servers it starts can be reached."""

    @abstractmethod
    async def launch(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> Launched:
        """Start it; what it says goes to the file `log`. Raises FileNotFoundError where there is no such program."""

    @abstractmethod
    async def free_port(self) -> int: ...


class LocalProcess(Launched):
    def __init__(self, process: asyncio.subprocess.Process, log: Path):
        self._process, self._log = process, log
        self.pid = process.pid

    async def wait(self) -> int:
        return await self._process.wait()

    async def stop(self, grace_s: float) -> None:
        for how, seconds in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
            if self._process.returncode is not None:
                return
            with suppress(ProcessLookupError):
                os.killpg(self.pid, how)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), seconds)

    async def tail(self, lines: int) -> list[str]:
        try:
            with self._log.open(encoding="utf-8", errors="replace") as file:
                return [line.rstrip("\n") for line in deque(file, lines)]
        except FileNotFoundError:
            return []


class LocalLauncher(Launcher):
    """Processes of this machine, each the head of a group of its own, so that its children end with it."""

    host = "127.0.0.1"

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
        return LocalProcess(process, log)

    async def free_port(self) -> int:
        with socket.socket() as found:
            found.bind((self.host, 0))
            return found.getsockname()[1]
