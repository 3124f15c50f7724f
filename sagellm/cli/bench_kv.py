"""`sagellm bench kv`: policies of the KV cache over a recorded trace."""

from __future__ import annotations

from pathlib import Path

import click

from sagellm.errors import unknown
from sagellm.kv.policies import POLICIES


@click.command()
@click.option("--trace", type=click.Path(path_type=Path), help="JSON lines of timestamp, input_length, "
              "output_length, hash_ids; without it, a trace is made.")  # fmt: skip
@click.option("--policy", "policies", multiple=True, help=f"Several times for several; all by default: "
              f"{', '.join(POLICIES)}, belady.")  # fmt: skip
@click.option("--blocks", "pools", type=click.IntRange(1), multiple=True, default=(1000, 2500, 5000, 10000, 20000),
              show_default=True, help="Size of the pool; several times for several.")  # fmt: skip
@click.option("--requests", type=click.IntRange(1), help="Only so many of the trace.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the trace that is made.")
@click.option(
    "--tenants", is_flag=True, help="The trace that is made is of four tenants of different habits."
)
@click.option("--write", type=click.Path(path_type=Path), help="Write the trace that is made to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one line a result.")
def kv(trace, policies, pools, requests, seed: int, tenants: bool, write, as_json: bool) -> None:
    """Which share of a trace's blocks is found in the KV cache, by policy, beside Belady's optimum."""
    from sagellm.bench.conversations import ALONE, TENANTS, conversations, write_trace
    from sagellm.bench.kv import EVERY, compare
    from sagellm.bench.report import show
    from sagellm.bench.workload import read_trace

    for name in policies:
        if name not in EVERY:
            raise unknown("policy", name, EVERY)
    if trace:
        rows = read_trace(trace, requests)
    else:
        rows = conversations(requests or 8000, seed, TENANTS if tenants else ALONE)
    if write:
        write_trace(rows, write)
    for blocks in pools:
        found = list(compare(rows, policies or EVERY, (blocks,)))
        show(found, tuple(found[0]), as_json)
