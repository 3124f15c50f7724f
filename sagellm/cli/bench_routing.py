"""`sagellm bench route` and `sagellm bench fleet`: how fast engines are chosen, and what comes of the choices."""

from __future__ import annotations

from pathlib import Path

import click

from sagellm.cli.bench import JSON, SEED
from sagellm.control_plane.routing.strategies import STRATEGIES
from sagellm.errors import unknown

STRATEGY = click.option("--strategy", "strategies", multiple=True, help=f"Several times for several; all by default: "
                        f"{', '.join(STRATEGIES)}.")  # fmt: skip


def _known(strategies: tuple[str, ...]) -> tuple[str, ...]:
    for name in strategies:
        if name not in STRATEGIES:
            raise unknown("strategy", name, STRATEGIES)
    return strategies or tuple(STRATEGIES)


@click.command()
@STRATEGY
@click.option("--engines", type=click.IntRange(1), multiple=True, default=(64,), show_default=True,
              help="Several times for several.")  # fmt: skip
@click.option("--requests", type=click.IntRange(1), default=4000, show_default=True)
@SEED
@JSON
def route(strategies, engines, requests: int, seed: int, as_json: bool) -> None:
    """Choices a second of one core: alone, from a chat's body of about 1,000 characters on, and with its life."""
    from sagellm.bench.report import show
    from sagellm.control_plane.speed import decide

    found = [decide(name, count, requests, seed) for count in engines for name in _known(strategies)]
    show(found, tuple(found[0]), as_json)


@click.command()
@click.option("--trace", type=click.Path(path_type=Path), help="JSON lines of timestamp, input_length, "
              "output_length, hash_ids; without it, a trace is made.")  # fmt: skip
@STRATEGY
@click.option("--engines", type=click.IntRange(1), default=4, show_default=True)
@click.option("--blocks", "pools", type=click.IntRange(1), multiple=True, default=(2500,), show_default=True,
              help="Blocks of the trace that each engine's KV cache holds; several times for several.")  # fmt: skip
@click.option("--requests", type=click.IntRange(1), help="Only so many of the trace.")
@click.option("--pace", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
              help="So many times as fast as they came.")  # fmt: skip
@SEED
@JSON
def fleet(trace, strategies, engines: int, pools, requests, pace: float, seed: int, as_json: bool) -> None:
    """A trace over simulated engines with the real prefix index: what is found in their caches, and how long it takes.

    Each engine runs a model of 7 billion parameters on an accelerator of 300 TFLOP/s and 1.5 TB/s, by the cost model.
    """
    from sagellm.bench.conversations import conversations
    from sagellm.bench.report import show
    from sagellm.bench.workload import read_trace
    from sagellm.control_plane.simulator import simulate

    names = _known(strategies)
    rows = read_trace(trace, requests) if trace else conversations(requests or 4000, seed)
    for blocks in pools:
        head = {"engines": engines, "blocks": blocks}
        results = [
            head | simulate(rows, name, engines, blocks, pace=pace, seed=seed).summary() for name in names
        ]
        show(results, tuple(results[0]), as_json)
