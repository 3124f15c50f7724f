"""Engines on the machines of a Ray cluster: an actor each, which holds the devices and runs the engine's server."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sagellm.control_plane.launch import Launched, Launcher, Place
from sagellm.errors import UserError

RESOURCES = {"ascend": "NPU", "mlu": "MLU", "dcu": "GPU", "xpu": "XPU", "cuda": "GPU"}
"""Device of ours -> resource of Ray's; Ray finds GPU and NPU itself, and the others are given to `ray start
--resources`."""
PLACE_SECONDS = 60.0
NAMESPACE = "sagellm"
DEATH_SIGNAL = 1
"""Of prctl(2): the signal that a process gets when its parent ends."""


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("package ray is not installed; install: pip install 'sagellm[ray]'") from error
    return ray


def needs(device: str | None, ranks: int) -> dict[str, Any]:
    """Options of the actor: what it must have to itself."""
    name = (device or "cpu").partition(":")[0].partition("+")[0]
    resource = RESOURCES.get(name)
    if resource is None:
        return {"num_cpus": ranks}
    if resource == "GPU":
        return {"num_cpus": 1, "num_gpus": ranks}
    return {"num_cpus": 1, "resources": {resource: ranks}}


def _die_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGTERM)


class _Machine:
    """Runs in the actor's process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._log = Path()

    def host(self) -> str:
        import ray

        return ray.util.get_node_ip_address()

    def free_port(self) -> int:
        with socket.socket() as found:
            found.bind(("", 0))
            return found.getsockname()[1]

    def start(self, command: list[str], env: dict[str, str], log: str) -> int | None:
        """The process's id; None where there is no such program."""
        self._log = Path(log)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as file:
            try:
                self._process = subprocess.Popen(
                    command,
                    env={**os.environ, **env},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            except FileNotFoundError:
                return None
        return self._process.pid

    def wait(self) -> int:
        assert self._process is not None
        return self._process.wait()

    def signal(self, number: int) -> None:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    def tail(self, lines: int) -> list[str]:
        return self._log.read_text(errors="replace").splitlines()[-lines:] if self._log.exists() else []


class _RayProcess(Launched):
    def __init__(self, actor: Any, pid: int):
        self.pid, self._actor = pid, actor
        self._status: int | None = None
        self._waits = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        ray = _ray()
        try:
            self._status = await self._actor.wait.remote()
        except ray.exceptions.RayActorError:
            self._status = -1

    def status(self) -> int | None:
        return self._status

    async def stop(self, grace_s: float) -> None:
        ray = _ray()
        for number, seconds in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
            if self._status is None:
                await self._actor.signal.remote(int(number))
                await asyncio.wait([self._waits], timeout=seconds)
        ray.kill(self._actor)

    async def tail(self, lines: int) -> list[str]:
        ray = _ray()
        try:
            return await self._actor.tail.remote(lines)
        except ray.exceptions.RayActorError:
            return ["the machine was lost"]


class _RayPlace(Place):
    def __init__(self, actor: Any, host: str):
        self._actor, self.host = actor, host

    async def free_port(self) -> int:
        return await self._actor.free_port.remote()

    async def launch(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> Launched:
        pid = await self._actor.start.remote(list(command), dict(env), str(log.absolute()))
        if pid is None:
            _ray().kill(self._actor)
            raise FileNotFoundError(command[0])
        return _RayProcess(self._actor, pid)


class RayLauncher(Launcher):
    """Machines must have the engine installed. Engines end with their control plane."""

    def __init__(self, address: str):
        """`auto` joins the cluster that this machine belongs to. Raises UserError where there is none."""
        ray = _ray()
        if not ray.is_initialized():
            try:
                ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
            except (ConnectionError, ValueError, RuntimeError) as error:
                said = str(error).splitlines()[0]
                raise UserError(
                    f"no Ray cluster at {address!r} ({said}); accepted: ray://host:10001, or auto"
                ) from error

    async def place(self, device: str | None, ranks: int) -> Place:
        ray = _ray()
        wanted = needs(device, ranks)
        actor = ray.remote(_Machine).options(max_concurrency=4, **wanted).remote()
        try:
            host = await asyncio.wait_for(actor.host.remote(), PLACE_SECONDS)
        except TimeoutError as error:
            ray.kill(actor)
            has = ", ".join(
                f"{name} {amount:g}" for name, amount in sorted(ray.available_resources().items())
            )
            raise UserError(f"no machine of the cluster has {wanted} free; it has: {has}") from error
        return _RayPlace(actor, host)

    def adopt(self, pid: int, port: int, log: Path) -> Launched | None:
        return None
