"""A control plane in this process, until it is told to stop."""

from __future__ import annotations

import gc
import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import click
import uvicorn

from sagellm.control_plane.app import make_app
from sagellm.control_plane.manager import ControlPlaneManager
from sagellm.errors import UserError
from sagellm.server.config import ServerConfig
from sagellm.server.run import listen


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_engine(text: str) -> dict[str, Any]:
    """`[KIND@]ID=http://host:port` as arguments of `register_engine`, but for the model, which is asked for."""
    name, _, address = text.partition("=")
    kind, _, name = name.rpartition("@")
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError:
        port = None
    if not name or parts.scheme != "http" or not parts.hostname or port is None:
        raise UserError(f"engine {text!r}; accepted: ID=http://host:port, or KIND@ID=http://host:port")
    return {"engine_id": name, "host": parts.hostname, "port": port, "engine_kind": kind or "llm"}


def run(
    manager: ControlPlaneManager,
    engines: Iterable[Mapping[str, Any]],
    *,
    host: str,
    port: int,
    keys: tuple[str, ...] = (),
    drain_seconds: float = 30,
) -> None:
    """Serve until SIGINT or SIGTERM. Raises UserError where others could start processes here without a key."""
    if not keys and not is_loopback(host):
        raise UserError(f"host is {host} and there is no key; accepted: --api-key, or a loopback address")
    for given in engines:
        manager.register_engine(**({"model_id": ""} | given))
    with listen(ServerConfig(host=host, port=port)) as found:
        app = make_app(manager, keys, drain_seconds=drain_seconds)
        address = f"http://{host}:{found.getsockname()[1]}"
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=int(drain_seconds) + 5,
            lifespan="on",
        )
        gc.collect()
        gc.freeze()  # modules and what they hold stay: the collector need not go through them again
        click.echo(f"ready: control plane ({manager.router.strategy.name}) at {address}/v1", err=True)
        uvicorn.Server(settings).run(sockets=[found])
