"""`sagellm replay`: a recorded step runs again, from its text and its inputs."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--target", default=None, help="Backend to run on; default: the recorded one.")
@click.option("--model", "-m", default=None, help="Where the weights are; default: the recorded model.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def replay(file: Path, target: str | None, model: str | None, as_json: bool) -> None:
    """Run the step in FILE (an .mlir text with its .safetensors beside it) again, and compare with the recording."""
    from sagellm.engine.record import replay as run

    done = run(file, target, model)
    tokens = done.outcome.tokens.tolist()
    result = {
        "forwarded": done.outcome.forwarded,
        "tokens": tokens,
        "recorded_tokens": None if done.recorded_tokens is None else done.recorded_tokens.tolist(),
        "logits_difference": done.difference,
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(f"forwarded {done.outcome.forwarded} tokens; next tokens: {tokens}")
    if done.recorded_tokens is None:
        click.echo("the file holds no recorded result to compare with")
        return
    same = (
        "the same"
        if done.recorded_tokens.tolist() == tokens
        else f"recorded were {done.recorded_tokens.tolist()}"
    )
    click.echo(f"{same}; largest difference of a logit: {done.difference:.3g}")
