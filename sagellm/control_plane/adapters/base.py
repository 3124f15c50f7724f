"""A server that can be started: its command line, and its process."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from attrs import field, frozen
from attrs.validators import optional

from sagellm import checks
from sagellm.control_plane.launch import Launched, Launcher, Place
from sagellm.control_plane.remote import RemoteEngine
from sagellm.errors import UserError


@frozen(kw_only=True)
class EngineOptions:
    """What an engine is started with, in words that all kinds understand."""

    model: str = field(validator=checks.text)
    """Folder or hub name; what clients call it unless `served_model_name` says otherwise."""
    served_model_name: str | None = field(default=None, validator=optional(checks.text))
    host: str = field(default="127.0.0.1", validator=checks.text)
    """Address that it listens on."""
    device: str | None = field(default=None, validator=optional(checks.text))
    backend: str | None = field(default=None, validator=optional(checks.text))
    kv_schema: str | None = field(default=None, validator=optional(checks.text))
    tensor_parallel: int = field(default=1, validator=checks.whole())
    pipeline_parallel: int = field(default=1, validator=checks.whole())
    max_concurrent: int | None = field(default=None, validator=optional(checks.whole()))
    """Requests that run at once."""
    max_model_len: int | None = field(default=None, validator=optional(checks.whole()))
    extra: tuple[str, ...] = field(default=(), validator=checks.each(tuple, checks.text))
    """Put behind the command line as they are."""

    def refuse(self, kind: str, *names: str) -> None:
        """Raises UserError where one of these options, which this kind of engine has not, is given."""
        default = EngineOptions(model=self.model)
        for name in names:
            if (value := getattr(self, name)) != getattr(default, name):
                raise UserError(f"{name} is {value!r} for an engine of kind {kind}; accepted: without it")


class ServerAdapter(RemoteEngine):
    """A server of one kind: attached to where it runs, or started.

    `Adapter("http://host:port")` attaches. `Adapter.launched(options, ...)` has a process of its own, which `start`
    starts and `stop` ends.
    """

    KIND: ClassVar[str]
    MISSING: ClassVar[str]
    """What to do where the engine is not installed: one line."""

    _options: EngineOptions | None = None
    _place: Place | None = None
    _process: Launched | None = None

    @classmethod
    def launched(
        cls, options: EngineOptions, place: Place, port: int, *, engine_id: str, log: Path
    ) -> ServerAdapter:
        """A server that `start` starts, at this place and port. Raises UserError for bad options."""
        cls.command(options, port)
        adapter = cls(f"http://{options.host}:{port}", options.served_model_name, engine_id=engine_id)
        adapter._options, adapter._place = options, place
        adapter.port, adapter.log = port, log
        return adapter

    port: int
    log: Path
    """Where what the server says is written."""

    @classmethod
    @abstractmethod
    def command(cls, options: EngineOptions, port: int) -> list[str]:
        """The engine's own server command."""

    @classmethod
    def environment(cls, options: EngineOptions) -> Mapping[str, str]:
        """Variables that the server needs beside this process's."""
        return {}

    @property
    def process(self) -> Launched | None:
        """None: it was not started by this object."""
        return self._process

    async def spawn(self) -> None:
        """Start the process; it is not ready yet. Raises UserError where the engine is not installed."""
        assert self._place is not None and self._options is not None and self._process is None
        command = self.command(self._options, self.port)
        try:
            env = self.environment(self._options)
            self._process = await self._place.launch(command, env, self.log)
        except FileNotFoundError as error:
            raise UserError(f"{command[0]!r} was not found; {self.MISSING}") from error

    def adopt(self, launcher: Launcher, pid: int, port: int, log: Path) -> None:
        """Take over a process that another control plane had started, if it goes on."""
        self._process, self.log = launcher.adopt(pid, port, log), log

    async def ended(self) -> str:
        """Where its process has ended: one line with the last it said; else empty."""
        if self._process is None or (status := self._process.status()) is None:
            return ""
        last = [line for line in await self._process.tail(20) if line.strip()] or ["it said nothing"]
        return f"{self.engine_id} ended with status {status}: {last[-1].strip()}"

    async def start(self) -> None:
        """Raises UserError where the server ends before it is ready, with the last it said."""
        if self._place is not None and self._process is None:
            await self.spawn()
        waits = asyncio.create_task(super().start())
        try:
            while not waits.done():
                if why := await self.ended():
                    raise UserError(why)
                await asyncio.wait([waits], timeout=0.2)
            waits.result()
        finally:
            waits.cancel()

    async def stop(self, drain_s: float = 30) -> None:
        await super().stop(drain_s)
        if self._process is not None:
            await self._process.stop(drain_s)
