"""What the control plane costs: the same load straight to an engine's server and through the control plane, in turns.

    sagellm control-plane serve --register vllm@vllm=http://127.0.0.1:8001 &
    python tools/bench_control_plane.py --engine http://127.0.0.1:8001 --control-plane http://127.0.0.1:8889 --pid $!

Both must be there already, and no other engine be registered with the control plane. A turn is `--requests` streams of
random token ids, `--at-once` of them at a time; who goes first changes from pair to pair. Printed are medians, and of
the ratios or differences within pairs the median with an interval that holds it in 95 % of cases (order statistics).
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import statistics
import time
import urllib.request
from collections.abc import Sequence
from urllib.parse import urlsplit

import click
import psutil

USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
FIGURES = ("tokens_per_s", "ttft_ms", "tpot_ms")


async def stream(address: str, body: dict) -> tuple[float, float, int]:
    """Seconds to the first token and between two tokens of one stream, and its tokens, by a client that does little."""
    where, sent = urlsplit(address), json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(sent)}\r\nConnection: close\r\n\r\n"
    )
    began, times, tokens = time.perf_counter(), [], 0
    writer.write(head.encode() + sent)
    said = b""
    while line := await reader.readline():
        if line.startswith(b"data: {") and b'"choices":[{' in line.replace(b" ", b""):
            times.append(time.perf_counter() - began)
        if found := USAGE.search(line):
            tokens = int(found[1])
        said = line if line.strip() else said
    writer.close()
    if not times or tokens < 2:
        raise click.ClickException(f"{address} answered {said[:300]!r}")
    return times[0], (times[-1] - times[0]) / (tokens - 1), tokens


async def turn(address: str, bodies: Sequence[dict], at_once: int) -> dict[str, float]:
    """Medians over one turn's requests, and its tokens a second."""
    left, seen = iter(bodies), []

    async def client() -> None:
        for body in left:
            seen.append(await stream(address, body))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    seconds = time.perf_counter() - began
    firsts, gaps, tokens = zip(*seen)
    return {
        "tokens_per_s": sum(tokens) / seconds,
        "ttft_ms": statistics.median(firsts) * 1e3,
        "tpot_ms": statistics.median(gaps) * 1e3,
    }


def spent(pid: int | None) -> float:
    """Processor seconds of a process so far."""
    return sum(psutil.Process(pid).cpu_times()[:2]) if pid else 0.0


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the two values between which the median of all such runs lies in 95 % of cases, if any do."""
    ordered, n, below, rank = sorted(values), len(values), 0.0, 0
    while rank < n // 2 and (below := below + math.comb(n, rank) / 2**n) <= 0.025:
        rank += 1
    return statistics.median(ordered), ordered[max(0, rank - 1)], ordered[n - max(1, rank)]


@click.command()
@click.option("--engine", required=True, help="Address of the engine's server.")
@click.option("--control-plane", required=True, help="Address of the control plane's.")
@click.option("--model", help="[default: the engine's first]")
@click.option("--requests", default=200, show_default=True, help="Of each turn.")
@click.option("--at-once", default=8, show_default=True)
@click.option("--prompt", default=32, show_default=True, help="Tokens.")
@click.option("--output", default=16, show_default=True, help="Tokens.")
@click.option("--pairs", default=9, show_default=True)
@click.option("--pid", type=int, help="Of the control plane: its processor time is printed too.")
@click.option("--vocabulary", default=4096, show_default=True, help="Token ids are below this.")
def main(engine, control_plane, model, requests, at_once, prompt, output, pairs, pid, vocabulary) -> None:
    if model is None:
        with urllib.request.urlopen(f"{engine}/v1/models") as answer:
            model = json.load(answer)["data"][0]["id"]
    draw = random.Random(0)

    def bodies(count: int) -> list[dict]:
        """Prompts that nobody saw, so that no turn finds those of another in a cache."""
        fixed = {"model": model, "max_tokens": output, "ignore_eos": True, "temperature": 0, "stream": True}
        fixed |= {"stream_options": {"include_usage": True}}
        return [
            fixed | {"prompt": [draw.randrange(10, vocabulary) for _ in range(prompt)]} for _ in range(count)
        ]

    sides = {"engine": engine, "control plane": control_plane}
    for address in sides.values():  # warm
        asyncio.run(turn(address, bodies(2 * at_once), at_once))
    got: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    before = spent(pid)
    for pair in range(pairs):
        for name in list(sides)[:: 1 if pair % 2 else -1]:
            got[name].append(asyncio.run(turn(sides[name], bodies(requests), at_once)))
        straight, through = (got[name][-1] for name in sides)
        click.echo("  ".join(f"{f} {straight[f]:.2f} -> {through[f]:.2f}" for f in FIGURES), err=True)
    click.echo(f"{'':<14}{'engine':>10}{'through':>10}{'ratio':>9}  interval         difference  interval")
    for figure in FIGURES:
        straight, through = ([one[figure] for one in got[name]] for name in sides)
        ratio, low, high = median_interval([b / a for a, b in zip(straight, through)])
        more, least, most = median_interval([b - a for a, b in zip(straight, through)])
        click.echo(
            f"{figure:<14}{statistics.median(straight):>10.2f}{statistics.median(through):>10.2f}{ratio:>9.3f}"
            f"  {low:.3f} to {high:.3f}   {more:>+9.2f}  {least:+.2f} to {most:+.2f}"
        )

    if pid:
        seconds = (spent(pid) - before) / (pairs * requests)
        click.echo(
            f"processor time of the control plane, its probes included: {seconds * 1e3:.2f} ms a request"
        )


if __name__ == "__main__":
    main()
