"""`sagellm devices`: what is on this machine, whose it is, what was looked for, and what the backends can do."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click
from attrs import asdict

from sagellm import backends
from sagellm.backends import hardware
from sagellm.backends.devices import Device, Probe, probe, vendors
from sagellm.conformance.size import ENTRIES, LINES, sizes
from sagellm.errors import UserError
from sagellm.host import processors
from sagellm.target import CapabilityDescriptor


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
@click.option(
    "--chips", is_flag=True, help="What is known of the vendors' chips, each value with its source."
)
@click.option(
    "--hardware-table", is_flag=True, help="docs/hardware.md: what was verified on which chip, and how."
)
@click.option("--backends", "as_sizes", is_flag=True, help="How large each vendor's folder is.")
def devices(as_json: bool, chips: bool, hardware_table: bool, as_sizes: bool) -> None:
    """Show the devices of this machine, and the backends; or what is known of vendors' chips."""
    if chips + hardware_table + as_sizes > 1 or (as_json and (hardware_table or as_sizes)):
        given = "--backends" if as_sizes else "--hardware-table"
        raise UserError(f"{given} is given with another option; accepted: one of them")
    if hardware_table:
        click.echo(hardware.page(vendors()), nl=False)
    elif as_sizes:
        click.echo(f"{'target':<10} {'lines':>5}  kernel table   (the bar: {LINES} lines, {ENTRIES} entries)")
        for size in sizes():
            mark = "" if size.within else "   over the bar"
            click.echo(f"{size.target:<10} {size.lines:>5}  {size.entries:>2} entries{mark}")
    elif chips:
        known = [chip for vendor in vendors() for chip in vendor.chips]
        click.echo(json.dumps([*map(asdict, known)], indent=2) if as_json else hardware.chips_text(known))
    else:
        _here(as_json)


def _here(as_json: bool) -> None:
    known = vendors()
    probes = [probe(vendor, known) for vendor in known]
    able: dict[str, CapabilityDescriptor | str] = {}
    for name in backends.names():
        try:
            able[name] = backends.load(name).capability
        except Exception as error:  # a stranger's package may fail in any way; the list goes on
            able[name] = f"cannot be used here: {error}"
    auto = backends.best()
    if as_json:
        found = {
            "auto": auto,
            "vendors": {p.vendor.name: p.to_dict() for p in probes},
            "backends": {n: c if isinstance(c, str) else c.to_dict() for n, c in able.items()},
        }
        click.echo(json.dumps(found, indent=2))
        return
    click.echo("\n".join(_vendors_text(probes, auto)))
    for name, capability in able.items():
        click.echo("")
        click.echo("\n".join(_capability_text(name, capability)))


def _vendors_text(probes: Sequence[Probe], auto: str) -> list[str]:
    lines = []
    for p in probes:
        lines.append(f"{p.vendor.title} (--device {p.vendor.name}, torch device {p.vendor.device!r})")
        lines += [f"  found     {_device_text(device)}" for device in p.devices]
        if not p.found:
            lines.append(f"  none      {p.why_none}")
        if p.missing:
            lines.append(f"  install   {p.vendor.install}")
        if p.looked:
            lines.append(f"  looked for {'; '.join(map(str, p.looked))}")
    unused = [p.vendor.title for p in probes if p.found and p.vendor.name not in backends.names()]
    lines.append(f"auto is {auto}{f'; no code generator here for {unused}' if unused else ''}")
    return lines


def _device_text(device: Device) -> str:
    said = [device.name, *device.ids]
    if device.memory:
        said.append(f"{device.memory / 2**30:.1f} GiB")
    return f"{device.index}: {', '.join(said)}; {device.chip.name if device.chip else 'no descriptor fits'}"


def _capability_text(name: str, c: CapabilityDescriptor | str) -> list[str]:
    if isinstance(c, str):
        return [f"backend {name}: {c}"]
    any_size = " or any other number of" if c.any_block_size else ""
    layouts = ", ".join(f"{dtype}: {layout}" for dtype, layout in c.linear_layouts.items())
    cores = f", {processors()} cores" if c.device == "cpu" else ""
    return [
        f"backend {name}: torch device {c.device}{cores}",
        f"  dtypes    {', '.join(c.dtypes)}",
        f"  KV cache  {', '.join(c.kv_dtypes)}; blocks of {', '.join(map(str, c.block_sizes))}{any_size} tokens",
        f"  layouts   {layouts or 'plain'}",
        f"  kernels   {len(c.kernels)}: {', '.join(sorted(c.kernels))}",
        *(f"  {note}" for note in c.notes),
        *(
            f"  {what}  {figure.value:g} {figure.unit} ({figure.source}; "
            f"{'measured' if figure.verified else 'not verified'})"
            for what, figure in c.figures.items()
        ),
    ]
