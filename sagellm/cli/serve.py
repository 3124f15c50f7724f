"""`sagellm serve`: an OpenAI-compatible HTTP server over one engine."""

from __future__ import annotations

import os
from pathlib import Path

import click

from sagellm import passes
from sagellm.cli.options import MODEL, MODEL_NAMES, engine_config, options, take
from sagellm.config import EngineConfig
from sagellm.errors import UserError
from sagellm.ports import SagePorts

GUESSING = "speculative-branching"
EXPLAINED_STEPS = 64
"""That `--debug-routes` keeps where the settings do not say how many."""


@click.command()
@click.argument("model_folder", metavar="[MODEL]", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, help="0 takes one that is free.  [default: SAGELLM_PORT_SERVE or 8901]")
@click.option(
    "--api-key",
    multiple=True,
    envvar="SAGELLM_API_KEY",
    help="Key that opens the routes; may be given often.",
)
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File with one key a line.")
@click.option("--served-model-name", help="What clients call the model.")
@click.option("--tool-call-parser", help="hermes, llama or deepseek.  [default: by the chat template]")
@click.option("--max-model-len", type=int, help="The same as --max-length.")
@click.option("--max-sequences", type=int, help="Sequences that run at once.  [default: 64]")
@click.option("--max-body-bytes", type=int, default=8 * 2**20, help="Larger requests get 413.")
@click.option("--drain-seconds", type=float, default=30.0, help="How long open streams may go on at the end.")
@click.option("--debug-routes", is_flag=True, help="Have /debug, which explains the last steps.")
@click.option(
    "--speculative/--no-speculative",
    default=None,
    help="Guess tokens where it pays.  [default: as --pipeline]",
)
@click.option("--core", help="process, or inline for the core in this process.  [default: process]")
@options(*MODEL)
def serve(
    model_folder: str | None,
    host: str,
    port: int | None,
    api_key: tuple[str, ...],
    api_key_file: Path | None,
    served_model_name: str | None,
    tool_call_parser: str | None,
    max_model_len: int | None,
    max_body_bytes: int,
    drain_seconds: float,
    debug_routes: bool,
    speculative: bool | None,
    **given,
) -> None:
    """Serve MODEL (a folder, a hub name, or the built-in one) to OpenAI's clients."""
    from sagellm.server.config import ServerConfig
    from sagellm.server.run import run

    settings = take(given, (*MODEL_NAMES, "max_sequences", "core"))
    for one, other, value in (
        ("model", "MODEL", model_folder),
        ("max_length", "--max-model-len", max_model_len),
    ):
        if value is not None and settings[one] is not None:
            raise UserError(f"--{one.replace('_', '-')} and {other} are both given; accepted: one of them")
        settings[one] = settings[one] if value is None else value
    config = ServerConfig(
        host=host,
        port=SagePorts.load(os.environ).serve if port is None else port,
        api_keys=(*api_key, *read_keys(api_key_file)),
        served_model_name=served_model_name,
        tool_call_parser=tool_call_parser,
        max_body_bytes=max_body_bytes,
        drain_seconds=drain_seconds,
        debug_routes=debug_routes,
    )
    engine = engine_config(settings)
    if settings["core"] is None and "SAGELLM_CORE" not in os.environ:
        engine = engine.changed(core="process")
    if speculative is not None:
        engine = engine.changed(pipeline=_with_guesses(engine, speculative))
    if debug_routes and not engine.explain_steps:
        engine = engine.changed(explain_steps=EXPLAINED_STEPS)
    run(config, engine)


def _with_guesses(engine: EngineConfig, wanted: bool) -> str:
    """The pipeline with the pass that guesses tokens, or without it."""
    pipeline = passes.pipeline(engine.pipeline, engine.tensor_parallel)
    others = [str(p) for p in pipeline.passes if p.name != GUESSING]
    if wanted and len(others) == len(pipeline.passes):
        raise UserError(
            f"--speculative is given and the pipeline has no {GUESSING}; accepted: one that has it"
        )
    return str(pipeline) if wanted else ",".join(others)


def read_keys(file: Path | None) -> list[str]:
    """One a line; none without a file."""
    if file is None:
        return []
    try:
        keys = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read keys from {str(file)!r}: {error}") from error
    if not keys:
        raise UserError(f"{str(file)!r} holds no key; accepted: one a line")
    return keys
