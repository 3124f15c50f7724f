"""`sagellm explain`: what prompts find in the KV cache, block by block."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import click
import numpy as np

from sagellm.cli.options import MODEL, MODEL_NAMES, engine_config, options, read_lines, take
from sagellm.errors import UserError
from sagellm.kv.policies import policy as policy_of
from sagellm.kv.prefix import Fate


@click.command()
@click.argument("prompt", nargs=-1)
@options(*MODEL)
@click.option("--file", "-f", help="A prompt a line.")
@click.option("--trace", type=click.Path(path_type=Path), help="Requests of a recorded trace in place of prompts; "
              "its blocks are the cache's.")  # fmt: skip
@click.option("--policy", default="lifetime", show_default=True, help="Which blocks leave first.")
@click.option("--blocks", type=click.IntRange(1), default=1000, show_default=True, help="Size of the cache.")
@click.option("--request", "only", type=click.IntRange(0), help="Tell of this request alone, from 0.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one line a request.")
def explain(prompt, file, trace, policy: str, blocks: int, only, as_json: bool, **given) -> None:
    """Serve prompts one after another, without computing them, and tell what each finds in the KV cache and why."""
    from sagellm.bench.kv import Asked, Replay, prompts
    from sagellm.bench.workload import read_trace

    texts = [*prompt, *(read_lines(file) if file else [])]
    if bool(texts) == bool(trace):
        raise UserError("nothing to explain; accepted: either prompts, --file or --trace")
    policy_of(policy)
    tokenizer, size = None, 1
    if trace:
        asked = prompts(read_trace(trace, None if only is None else only + 1))
    else:
        from sagellm.engine.planner import Planner
        from sagellm.engine.tokenizer import Tokenizer

        planner = Planner(engine_config(take(given, MODEL_NAMES)))
        size, tokenizer = planner.kv_schema.block_size, Tokenizer.load(planner.folder)
        asked = [Asked(np.array(tokenizer.encode(text), np.int32)) for text in texts]
    if only is not None and only >= len(asked):
        raise UserError(f"--request is {only}; accepted: 0 to {len(asked) - 1}")
    for served in Replay(policy, blocks, asked, size).serve(explain=True):
        if only is not None and served.number != only:
            continue
        parts = _parts(served.fates)
        if as_json:
            blocks_told = [{"from": a, "to": b, "found": fate.found, "why": fate.why} for a, b, fate in parts]
            told = {"request": served.number, "found": served.found, "blocks": served.asked}
            click.echo(json.dumps(told | {"parts": blocks_told}))
            continue
        ids = asked[served.number].ids
        length = len(ids)
        click.echo(f"request {served.number}: {served.found} of {served.asked} blocks found, "
                   f"{min(served.found * size, length - 1)} of {length} {'tokens' if tokenizer else 'blocks'} "
                   "need not be computed")  # fmt: skip
        for first, last, fate in parts:
            name = f"block {first}" if first == last else f"blocks {first} to {last}"
            click.echo(f"  {name:<16} {'found' if fate.found else 'missing':<8} {fate.why}")
        if tokenizer and served.found < served.asked:
            start = served.found * size
            text = tokenizer.decode(ids[start : start + size].tolist())
            click.echo(f"  the first missing block says {text!r}")


def _parts(fates: list[Fate]) -> list[tuple[int, int, Fate]]:
    """(first, last, fate) of neighbours that share one."""
    parts = []
    for fate, group in groupby(enumerate(fates), lambda pair: pair[1]):
        numbers = [number for number, _ in group]
        parts.append((numbers[0], numbers[-1], fate))
    return parts
