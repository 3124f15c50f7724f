"""`sagellm run`: continue prompts, or chat, with a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from attrs import asdict

from sagellm.batch import SamplingParams
from sagellm.cli.options import (
    MODEL,
    MODEL_NAMES,
    SAMPLING,
    SAMPLING_NAMES,
    engine_config,
    options,
    read_lines,
    take,
)
from sagellm.config import EngineConfig
from sagellm.engine.engine import GenerateResult, SageLLMEngine
from sagellm.errors import UserError


@click.command()
@click.argument("prompts", nargs=-1)
@options(*MODEL)
@click.option("--file", "-f", "file", default=None, help="File with one prompt a line; - is standard input.")
@click.option("--chat", is_flag=True, help="Put prompts through the model's chat template.")
@options(*SAMPLING)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a prompt.")
@click.option(
    "--record", type=click.Path(path_type=Path), help="Write every step here, for `sagellm replay`."
)
@click.option("--quiet", "-q", is_flag=True, help="Print the output alone, no timings.")
def run(
    prompts: tuple[str, ...], file: str | None, chat: bool, as_json: bool, record, quiet: bool, **given
) -> None:
    """Continue PROMPTS. Without any, and at a terminal, read them one after another."""
    settings, sampling = take(given, MODEL_NAMES), SamplingParams(**take(given, SAMPLING_NAMES))
    if file and prompts:
        raise UserError(f"prompts both as arguments and by --file {file!r}; accepted: one of them")
    if any(not prompt for prompt in prompts):
        raise UserError("a prompt is empty; accepted: some text")
    wanted = read_lines(file) if file else list(prompts)
    interactive = not wanted and sys.stdin.isatty()
    if not wanted and not interactive:
        wanted = read_lines("-")
    engine = load(engine_config(settings, record=record))
    if interactive:
        converse(engine, sampling, chat, quiet)
        return
    inputs = [engine.chat_prompt([{"role": "user", "content": p}]) if chat else p for p in wanted]
    if len(inputs) == 1 and not as_json:
        stream(engine, inputs[0], sampling, quiet)
        return
    results = engine.generate(inputs, sampling)
    check(results)
    for prompt, result in zip(wanted, results):
        click.echo(
            json.dumps(report(prompt, result), ensure_ascii=False) if as_json else f"{prompt}{result.text}"
        )
    if not as_json and not quiet:
        summary(engine, results)


def load(config: EngineConfig) -> SageLLMEngine:
    """The engine, with a progress bar on a terminal while weights load."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return SageLLMEngine(config=config)
    with Progress(
        TextColumn("loading {task.description}"), BarColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task(config.model, total=None)
        return SageLLMEngine(
            config=config,
            progress=lambda what, done, of: bar.update(task, completed=done, total=of),
        )


def stream(engine: SageLLMEngine, prompt, sampling: SamplingParams, quiet: bool) -> GenerateResult:
    outputs = engine.stream(prompt, sampling)
    for event in outputs:
        click.echo(event.text, nl=False)
    click.echo()
    check([outputs.result])
    if not quiet:
        summary(engine, [outputs.result])
    return outputs.result


def check(results: list[GenerateResult]) -> None:
    """A request that failed in the engine ends the command with its reason."""
    for result in results:
        if result.error:
            raise click.ClickException(result.error)


def converse(engine: SageLLMEngine, sampling: SamplingParams, chat: bool, quiet: bool) -> None:
    """Prompts from the terminal until end of file; with `chat`, one conversation."""
    messages: list[dict] = []
    while True:
        try:
            text = click.prompt(">", prompt_suffix=" ", type=str)
        except click.Abort:
            click.echo()
            return
        if chat:
            messages.append({"role": "user", "content": text})
        prompt = engine.chat_prompt(messages) if chat else text
        try:
            result = stream(engine, prompt, sampling, quiet)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            messages = messages[:-1]
            continue
        messages.append({"role": "assistant", "content": result.text})


def report(prompt: str, result: GenerateResult) -> dict:
    entry = {"prompt": prompt} | asdict(result)
    for name in ("queued", "ttft", "tpot"):
        entry[f"{name}_ms"] = round(entry.pop(name) * 1e3, 3)
    for output in entry["outputs"]:
        if not output["logprobs"]:
            del output["logprobs"], output["top_logprobs"]
    if entry["prompt_logprobs"] is None:
        del entry["prompt_logprobs"]
    if len(entry["outputs"]) == 1:
        entry |= entry.pop("outputs")[0]
    return entry


def summary(engine: SageLLMEngine, results: list[GenerateResult]) -> None:
    """Timings, and what the passes did, on stderr."""
    stats = engine.stats()
    ttft = max(r.ttft for r in results) * 1e3
    longer = [r.tpot for r in results if len(r.token_ids) > 1]
    tpot = f"{sum(longer) / len(longer) * 1e3:.2f} ms" if longer else "-"
    made = sum(len(output.token_ids) for r in results for output in r.outputs)
    click.echo(f"\n{made} tokens; TTFT {ttft:.1f} ms, TPOT {tpot}", err=True)
    click.echo(
        f"prompt tokens {stats.prompt}, of which {stats.reused} cached, {stats.shared} shared; "
        f"forwarded {stats.forwarded} tokens in {stats.steps} steps; "
        f"plan cache {stats.plan_hits} hits, {stats.plan_misses} misses",
        err=True,
    )
    for name, remarks in stats.remarks.items():
        click.echo(f"  {name:<16} applied {remarks['applied']}, declined {remarks['declined']}", err=True)
