"""A server in this process, until it is told to stop."""

from __future__ import annotations

import logging
import socket

import click
import uvicorn

from sagellm.config import EngineConfig
from sagellm.engine.engine import SageLLMEngine
from sagellm.errors import UserError
from sagellm.server.app import make_app
from sagellm.server.config import ServerConfig

log = logging.getLogger(__name__)


def listen(config: ServerConfig) -> socket.socket:
    """A socket that is bound; an address in use is told before a model is loaded."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((config.host, config.port))
    except (OSError, OverflowError) as error:
        found.close()
        raise UserError(f"cannot listen on {config.host} port {config.port}: {error}") from error
    return found


def run(config: ServerConfig, engine: EngineConfig) -> None:
    """Serve until SIGINT or SIGTERM. Raises UserError where the engine cannot be made."""
    failure: list[str] = []

    def fail(line: str) -> None:
        failure.append(line)
        server.should_exit = True

    with listen(config) as found:
        address = f"http://{config.host}:{found.getsockname()[1]}"

        def made() -> SageLLMEngine:
            click.echo(f"loading {engine.model}; {address}/health answers 503 until it is there", err=True)
            one = SageLLMEngine(config=engine)
            name = config.served_model_name or one.model_id
            click.echo(f"ready: {name} on {one.get_capability().backend} at {address}/v1", err=True)
            return one

        app = make_app(config, made, fail)
        settings = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=int(config.drain_seconds) + 5, lifespan="on"
        )
        server = uvicorn.Server(settings)
        server.run(sockets=[found])
    if failure:
        raise UserError(failure[0])
