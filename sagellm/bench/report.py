"""Benchmarks' results as a table, as JSON, and as a picture of latency over load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from sagellm.errors import UserError

Result = Mapping[str, object]


def show(results: Sequence[Result], columns: Sequence[str], as_json: bool) -> None:
    """One line a result: these columns as a table, or everything as JSON lines."""
    if as_json:
        for result in results:
            click.echo(json.dumps(result))
        return
    click.echo(table([[text(result.get(name, "-")) for name in columns] for result in results], columns))


def text(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(rows: Sequence[Sequence[str]], heads: Sequence[str]) -> str:
    """Columns aligned to the right, for a terminal or a file."""
    widths = [max(len(head), *(len(row[i]) for row in rows)) for i, head in enumerate(heads)]
    lines = [heads, *rows]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def plot(path: Path, results: Sequence[Result], series: Sequence[str], title: str) -> None:
    """A PNG with one panel a series of `<name>_p<percentile>_ms`, over the results' `rate`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"--plot needs matplotlib ({error}); accepted: pip install 'sagellm[plot]'") from None
    figure = Figure(figsize=(4.2 * len(series), 3.6), layout="constrained")
    panels = figure.subplots(1, len(series), squeeze=False)[0]
    for name, panel in zip(series, panels):
        for percentile, style in (("p50", "-o"), ("p90", "--s"), ("p99", ":^")):
            key = f"{name}_{percentile}_ms"
            points = sorted((result["rate"], result[key]) for result in results if key in result)
            if points:
                panel.plot(*zip(*points), style, label=percentile)
        panel.set(title=f"{name.upper()} (ms)", xlabel="requests a second", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title)
    try:
        FigureCanvasAgg(figure).print_png(str(path))
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error}") from error
