"""`sagellm bench speculation`: the same requests with guessed tokens and without."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from sagellm.cli.bench import JSON
from sagellm.cli.options import MODEL, MODEL_NAMES, engine_config, options, take

COLUMNS = (
    "workload", "requests", "plain_s", "guessing_s", "ratio", "least", "steps", "verify_steps", "drafted", "accepted",
    "different",
)  # fmt: skip


@click.command()
@options(*MODEL)
@click.option("--output", type=click.IntRange(1), default=128, show_default=True, help="Tokens to generate.")
@click.option("--requests", type=click.IntRange(1), default=8, show_default=True, help="Of those one by one.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Random texts at once.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@JSON
def speculation(output: int, requests: int, batch: int, repeats: int, as_json: bool, **given) -> None:
    """Code edits one by one (where the model has a tokenizer), random prompts one by one and once more, a batch of
    random texts, and documents to quote, one by one: by a model that can, of the size of the built-in one.

    Both engines serve a wave of requests before the next; seconds are medians, `ratio` is plain over guessing.
    """
    from sagellm.batch import SamplingParams
    from sagellm.bench import speculation as measure
    from sagellm.bench.copier import write_copier
    from sagellm.bench.report import show
    from sagellm.engine.engine import SageLLMEngine

    config = engine_config(take(given, MODEL_NAMES))
    greedy = SamplingParams(max_tokens=output, ignore_eos=True)
    drawn = SamplingParams(max_tokens=2 * output, ignore_eos=True, temperature=1.0)
    with SageLLMEngine(config=config) as engine:
        vocabulary = engine.vocab_size
        edits = measure.edits(requests, engine.tokenizer.encode) if engine.tokenizer else []
    some = measure.unlike(requests, 32, vocabulary)
    waves = {
        **({"edits": ([[prompt] for prompt in edits], greedy)} if edits else {}),
        "again": ([[prompt] for prompt in (*some, *some)], greedy),
        f"random x{batch}": ([measure.unlike(batch, 32, vocabulary)], drawn),
    }
    results = []
    for name, (wave, how) in waves.items():
        results.append({"workload": name} | measure.compare(config, wave, how, repeats))
    with TemporaryDirectory() as folder:
        copier = config.changed(model=str(write_copier(Path(folder))))
        with SageLLMEngine(config=copier) as engine:
            quotes = measure.quotes(requests, engine.tokenizer.encode)
        results.append(
            {"workload": "quotes"} | measure.compare(copier, [[q] for q in quotes], greedy, repeats)
        )
    show(results, COLUMNS, as_json)
