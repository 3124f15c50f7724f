"""How commands reach a control plane."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import click

from sagellm.errors import UserError
from sagellm.ports import SagePorts

SECONDS = 60.0


def PLANE(command: Callable) -> Callable:
    """`--url` and `--api-key`."""
    url = click.option(
        "--url",
        envvar="SAGELLM_CONTROL_PLANE_URL",
        help="Of the control plane.  [default: the gateway's port of this machine]",
    )
    key = click.option("--api-key", envvar="SAGELLM_API_KEY", help="If it wants one.")
    return url(key(command))


def control_plane_url(given: str | None) -> str:
    return (given or f"http://127.0.0.1:{SagePorts.load(os.environ).gateway}").rstrip("/").removesuffix("/v1")


def ask(
    url: str,
    api_key: str | None,
    method: str,
    path: str,
    body: Any = None,
    timeout: float | None = SECONDS,
) -> Any:
    """The JSON that a control plane answers. Raises UserError for a refusal, and where nobody answers."""
    from sagellm.control_plane.endpoint import EngineLost, HttpEndpoint
    from sagellm.control_plane.remote import message_of

    async def asking() -> Any:
        endpoint = HttpEndpoint(url, api_key)
        try:
            reply = await endpoint.send(method, path, body, timeout=timeout)
            said = await reply.read()
        finally:
            await endpoint.aclose()
        return reply.status, said

    try:
        status, said = asyncio.run(asking())
    except EngineLost as error:
        raise UserError(
            f"no control plane answers ({error}); accepted: --url of one, or start one with `sagellm gateway`"
        ) from error
    if status != 200:
        raise UserError(message_of(status, said))
    from pydantic_core import from_json

    return from_json(said)
