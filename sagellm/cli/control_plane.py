"""`sagellm control-plane serve`, which is also `sagellm gateway`: one address in front of many engines."""

from __future__ import annotations

import os
from pathlib import Path

import click

from sagellm.cli.serve import read_keys
from sagellm.ports import SagePorts

STRATEGIES = "round_robin, least_loaded, prefix_affinity, slo, hardware_first, composite"


@click.command("serve")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, help="0 takes one that is free.  [default: SAGELLM_PORT_GATEWAY or 8889]")
@click.option(
    "--strategy", default="composite", show_default=True, help=f"How engines are chosen: {STRATEGIES}."
)
@click.option("--seed", type=int, default=0, help="Of what is drawn where engines are equally good.")
@click.option(
    "--registry",
    type=click.Path(path_type=Path),
    help="File in which engines are kept.  [default: in SAGELLM_STATE, or ~/.local/state/sagellm]",
)
@click.option(
    "--register",
    multiple=True,
    metavar="ID=URL",
    help="An engine that runs, or will, as e1=http://10.0.0.5:8901; KIND@ID=URL says its kind.",
)
@click.option("--probe-every", type=float, default=1.0, show_default=True, help="Seconds.")
@click.option("--stall", type=float, default=60.0, show_default=True, help="Seconds without a token.")
@click.option("--queue", type=int, default=1024, show_default=True, help="Requests that may wait.")
@click.option("--max-concurrent", type=int, help="Requests at an engine that does not say its limit.")
@click.option("--cluster", help="Start engines through Ray, as ray://host:10001, or auto.")
@click.option("--api-key", multiple=True, envvar="SAGELLM_API_KEY", help="Key that opens the routes.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File with one key a line.")
@click.option(
    "--drain-seconds", type=float, default=30.0, help="How long open requests may go on at the end."
)
def serve(host, port, registry, register, cluster, api_key, api_key_file, drain_seconds, **settings) -> None:
    """Serve OpenAI's routes in front of all engines, and the routes that manage them."""
    from sagellm.control_plane.launch import launcher
    from sagellm.control_plane.manager import ControlPlaneConfig, ControlPlaneManager
    from sagellm.control_plane.registry import state_folder
    from sagellm.control_plane.run import parse_engine, run

    config = ControlPlaneConfig(registry=registry or state_folder() / "engines.json", **settings)
    manager = ControlPlaneManager(config, launcher=launcher(cluster))
    engines = [parse_engine(text) for text in register]
    run(
        manager,
        engines,
        host=host,
        port=SagePorts.load(os.environ).gateway if port is None else port,
        keys=(*api_key, *read_keys(api_key_file)),
        drain_seconds=drain_seconds,
    )


@click.group("control-plane")
def control_plane() -> None:
    """One address in front of many engines."""


control_plane.add_command(serve)
gateway = serve
