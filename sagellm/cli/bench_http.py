"""`sagellm bench http`: what a server costs beside its engine."""

from __future__ import annotations

import click

from sagellm.cli.bench import JSON, LENGTHS
from sagellm.cli.options import MODEL, MODEL_NAMES, engine_config, options, take

COLUMNS = ("streams", "pairs", "server_tokens_per_s", "engine_tokens_per_s", "ratio", "least", "most")
BESIDE = ("beside_tokens_per_s", "to_beside", "to_beside_least", "to_beside_most")


@click.command()
@options(*MODEL, *LENGTHS)
@click.option("--max-sequences", type=int, help="Sequences that run at once.  [default: 64]")
@click.option("--core", help="process, or inline; of both.  [default: process]")
@click.option("--streams", type=click.IntRange(1), default=16, show_default=True, help="At once.")
@click.option("--pairs", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--beside", help="Another server of OpenAI's API, http://host:port, such as vLLM's: the same streams."
)
@JSON
def http(prompt, output, streams: int, pairs: int, beside: str | None, as_json: bool, **given) -> None:
    """Streams through `sagellm serve` and the same from an engine in this process, in turns; ratio: server over engine.

    With --target null no model runs, and the server's tokens a second are the limit of the server itself.
    """
    from sagellm.bench import http as measure
    from sagellm.bench.report import show

    settings = take(given, (*MODEL_NAMES, "max_sequences", "core"))
    config = engine_config(settings)
    if settings["core"] is None:
        config = config.changed(core="process")
    found = measure.compare(config, streams, prompt, output, pairs, beside and beside.rstrip("/"))
    show([found], (*COLUMNS, *BESIDE) if beside else COLUMNS, as_json)
