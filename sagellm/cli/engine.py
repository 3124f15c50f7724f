"""`sagellm engine`: the engines of a control plane, started, listed, drained and stopped."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import click

from sagellm.cli.plane import PLANE, ask, control_plane_url
from sagellm.errors import UserError

COLUMNS = ("engine_id", "engine_kind", "model_id", "state", "active_requests", "address")


@click.group()
def engine() -> None:
    """Start, list, drain, stop and verify engines."""


@engine.command()
@click.argument("model")
@click.option("--engine-kind", default="sagellm", show_default=True, help="sagellm, vllm, lmdeploy or chitu.")
@click.option("--engine-id", help="[default: the kind with a number]")
@click.option("--engine-port", "port", type=int, help="[default: one that is free]")
@click.option("--device", help="As ascend, mlu, dcu, xpu, cuda or cpu.")
@click.option("--backend", help="The same for an engine that has backends of its own.")
@click.option("--kv-schema", help="Type of keys and values, as int8 or fp8.")
@click.option("--tensor-parallel", "-tp", type=int, default=1, help="Ranks of a layer.  [default: 1]")
@click.option("--pipeline-parallel", "-pp", type=int, default=1, help="Ranks of layers.  [default: 1]")
@click.option("--served-model-name", help="What clients call the model.  [default: MODEL]")
@click.option("--max-concurrent", type=int, help="Requests that run at once.")
@click.option("--max-model-len", type=int, help="Tokens of a sequence.")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="For routing by tags.")
@click.option("--extra", multiple=True, help="A word for the engine's own command line.")
@click.option("--wait/--no-wait", default=True, help="Until it is ready.  [default: wait]")
@PLANE
def start(url: str | None, api_key: str | None, labels: tuple[str, ...], **given: Any) -> None:
    """Have the control plane start an engine that serves MODEL."""
    for label in labels:
        if "=" not in label:
            raise UserError(f"label {label!r}; accepted: NAME=VALUE")
    body = given | {"labels": dict(label.split("=", 1) for label in labels), "extra": list(given["extra"])}
    where = control_plane_url(url)
    info = ask(where, api_key, "POST", "/v1/management/engines", body, timeout=None)
    click.echo(
        f"{info['engine_id']} is {info['state']} at {_address(info)}; ask for {info['model_id']!r} at {where}/v1"
    )


@engine.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print all that is known.")
@PLANE
def list_(url: str | None, api_key: str | None, as_json: bool) -> None:
    """The engines, with their states."""
    engines = ask(control_plane_url(url), api_key, "GET", "/v1/management/engines")["engines"]
    if as_json:
        click.echo(json.dumps(engines, indent=2))
        return
    rows = [COLUMNS, *([str(_shown(info, name)) for name in COLUMNS] for info in engines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


@engine.command()
@click.argument("engine_id")
@click.option("--drain-seconds", type=float, default=30.0, show_default=True, help="For open requests.")
@PLANE
def stop(url: str | None, api_key: str | None, engine_id: str, drain_seconds: float) -> None:
    """Drain an engine and end it; one that was only registered is forgotten."""
    path = f"/v1/management/engines/{engine_id}?drain_s={drain_seconds}"
    info = ask(control_plane_url(url), api_key, "DELETE", path, timeout=None)
    click.echo(f"{info['engine_id']} is {info['state']}")


@engine.command()
@click.argument("engine_id")
@PLANE
def drain(url: str | None, api_key: str | None, engine_id: str) -> None:
    """Send an engine nothing new."""
    info = ask(control_plane_url(url), api_key, "POST", f"/v1/management/engines/{engine_id}/drain", {})
    click.echo(f"{info['engine_id']} is {info['state']}, with {info['active_requests']} requests")


@engine.command()
@click.argument("engine_id")
@click.option("--lines", "-n", type=int, default=100, show_default=True)
@PLANE
def logs(url: str | None, api_key: str | None, engine_id: str, lines: int) -> None:
    """The last lines that an engine said."""
    path = f"/v1/management/engines/{engine_id}/logs?lines={lines}"
    click.echo("\n".join(ask(control_plane_url(url), api_key, "GET", path)["lines"]))


@engine.command()
@PLANE
def prune(url: str | None, api_key: str | None) -> None:
    """Forget the engines that are lost."""
    removed = ask(control_plane_url(url), api_key, "POST", "/v1/management/engines/prune", {})["removed"]
    click.echo(f"removed: {', '.join(removed) or 'none'}")


@engine.command()
@click.argument("place", metavar="URL|MODULE:OBJECT")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one line a promise.")
@click.pass_context
def verify(ctx: click.Context, place: str, as_json: bool) -> None:
    """Check that an engine keeps what the interface promises: a server, or an object of Python."""
    from attrs import asdict

    from sagellm.control_plane.endpoint import EngineLost
    from sagellm.control_plane.verify import load
    from sagellm.control_plane.verify import verify as verified

    try:
        results = asyncio.run(verified(load(place)))
    except EngineLost as error:
        raise UserError(f"nobody answers: {error}") from error
    for result in results:
        line = f"{result.outcome:<12}{result.promise}" + (f"  [{result.detail}]" if result.detail else "")
        click.echo(json.dumps(asdict(result)) if as_json else line)
    broken = sum(result.outcome == "broken" for result in results)
    if not as_json:
        click.echo(f"{len(results) - broken} of {len(results)} promises kept or not offered")
    if broken:
        ctx.exit(1)


def _shown(info: dict[str, Any], name: str) -> Any:
    return _address(info) if name == "address" else info[name]


def _address(info: dict[str, Any]) -> str:
    return f"http://{info['host']}:{info['port']}" if info["host"] else "in the control plane's process"
