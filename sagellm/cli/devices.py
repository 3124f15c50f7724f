"""`sagellm devices`: the backends and what they can do on this machine."""

from __future__ import annotations

import json
import os

import click
import torch
from attrs import asdict

from sagellm import backends


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def devices(as_json: bool) -> None:
    """Show the backends and what they can do on this machine."""
    found = {name: backends.load(name).capability for name in backends.names()}
    if as_json:
        entries = {name: asdict(c) | {"kernels": sorted(c.kernels)} for name, c in found.items()}
        click.echo(json.dumps(entries, indent=2))
        return
    for name, c in found.items():
        click.echo(
            f"{name}: torch device {c.device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        )
        click.echo(f"  dtypes      {', '.join(c.dtypes)}")
        click.echo(
            f"  KV cache    {', '.join(c.kv_dtypes)}; blocks of {', '.join(map(str, c.block_sizes))}"
            f"{' or any other number of' if c.any_block_size else ''} tokens"
        )
        click.echo(
            f"  layouts     {', '.join(f'{d}: {layout}' for d, layout in c.linear_layouts.items()) or 'plain'}"
        )
        click.echo(f"  kernels     {len(c.kernels)}: {', '.join(sorted(c.kernels))}")
        for note in c.notes:
            click.echo(f"  {note}")
        for what, figure in c.figures.items():
            how = "measured" if figure.verified else "not verified"
            click.echo(f"  {what}  {figure.value:g} {figure.unit} ({figure.source}; {how})")
