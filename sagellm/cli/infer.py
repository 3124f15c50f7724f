"""`sagellm infer`: one question through a control plane."""

from __future__ import annotations

import click

from sagellm.cli.plane import PLANE, control_plane_url
from sagellm.errors import UserError


@click.command()
@click.argument("prompt")
@click.option("--model", "-m", help="[default: the only one that is served]")
@click.option("--max-tokens", "-n", type=int, default=256, show_default=True)
@click.option("--temperature", type=float, help="0 is greedy.  [default: the engine's]")
@click.option("--system", help="What stands before the question.")
@click.option("--raw", is_flag=True, help="Continue the text, without a chat template.")
@PLANE
def infer(prompt, model, max_tokens, temperature, system, raw, url, api_key) -> None:
    """Ask PROMPT and print the answer as it comes."""
    from sagellm.control_plane.client import InferenceFailed, UnifiedInferenceClient

    more = {"max_tokens": max_tokens}
    if temperature is not None:
        more["temperature"] = temperature
    try:
        with UnifiedInferenceClient.create(control_plane_url(url), api_key=api_key) as client:
            if raw:
                chunks = client.generate_stream(prompt, model, **more)
            else:
                said = [{"role": "user", "content": prompt}]
                first = [{"role": "system", "content": system}] if system else []
                chunks = client.chat_stream([*first, *said], model, **more)
            for chunk in chunks:
                for choice in chunk["choices"]:
                    click.echo(choice["text"] if raw else choice["delta"].get("content") or "", nl=False)
            click.echo()
    except InferenceFailed as error:
        raise UserError(str(error)) from error
