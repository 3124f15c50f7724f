"""Options that several commands share, and how prompts are read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import click
from attrs import fields_dict

from sagellm.batch import SamplingParams
from sagellm.config import EngineConfig
from sagellm.errors import UserError
from sagellm.topology import TOPOLOGIES

MODEL = (
    click.option(
        "--config",
        type=click.Path(path_type=Path),
        help="YAML or JSON file of settings; options go before it.",
    ),
    click.option("--model", "-m", help="Folder, hub name, or builtin.  [default: builtin]"),
    click.option("--draft-model", help="A smaller model of the same vocabulary, to guess tokens ahead."),
    click.option(
        "--target",
        "--device",
        "--backend",
        "target",
        help="Backend to compile for; auto for the best.  [default: auto]",
    ),
    click.option("--dtype", help="auto, float32, bfloat16 or float16.  [default: auto]"),
    click.option(
        "--kv-dtype", "--kv-schema", "kv_dtype", help="Type of keys and values, as fp8.  [default: auto]"
    ),
    click.option("--pipeline", "-p", help="Passes, as name,name{option=value}; '' for none."),
    click.option("--tensor-parallel", type=int, help="Ranks that the model is divided among.  [default: 1]"),
    click.option(
        "--topology",
        help=f"How the ranks are joined, for predictions: auto, {', '.join(TOPOLOGIES)}; hccs@50 for 50 GB/s a link.",
    ),
    click.option("--block-size", type=int, help="Tokens per KV block.  [default: 16]"),
    click.option("--max-batched-tokens", type=int, help="Tokens of one step.  [default: 2048]"),
    click.option("--max-length", type=int, help="Longest sequence; default: the model's context."),
)
"""Settings of an engine. What is not given is None here: the file or `EngineConfig` says it."""
MODEL_NAMES = (
    "config", "model", "draft_model", "target", "dtype", "kv_dtype", "pipeline", "tensor_parallel", "topology",
    "block_size", "max_batched_tokens", "max_length",
)  # fmt: skip

SAMPLING = (
    click.option("--max-tokens", "-n", type=int, default=128, show_default=True, help="Tokens to generate."),
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-k", type=int, default=0, help="Keep the k likeliest tokens; 0 keeps all."),
    click.option(
        "--top-p", type=float, default=1.0, help="Keep the likeliest tokens up to this probability."
    ),
    click.option("--min-p", type=float, default=0.0, help="Keep tokens of this part of the likeliest one's."),
    click.option("--repetition-penalty", type=float, default=1.0),
    click.option("--presence-penalty", type=float, default=0.0),
    click.option("--frequency-penalty", type=float, default=0.0),
    click.option("--seed", type=int, default=None, help="The same seed draws the same tokens."),
    click.option("--stop", multiple=True, help="Text at which the output ends; may be given often."),
    click.option("--stop-token-id", "stop_token_ids", type=int, multiple=True),
    click.option("--min-tokens", type=int, default=0, help="End tokens cannot come before this many."),
    click.option(
        "--logit-bias",
        multiple=True,
        metavar="TOKEN:BIAS",
        callback=lambda _, __, given: tuple(bias_of(text) for text in given),
        help="Add this to a token's logit; may be given often.",
    ),
    click.option("--n", "n", type=int, default=1, help="Outputs for each prompt."),
    click.option("--ignore-eos", is_flag=True, help="Go on behind an end token."),
    click.option(
        "--logprobs", type=int, default=None, help="Also the logprobs of this many likeliest tokens."
    ),
    click.option("--prompt-logprobs", type=int, default=None, help="The same for the prompt's tokens."),
)
SAMPLING_NAMES = tuple(fields_dict(SamplingParams))


def bias_of(text: str) -> tuple[int, float]:
    token, _, bias = text.partition(":")
    try:
        return int(token), float(bias)
    except ValueError:
        raise UserError(f"logit bias {text!r}; accepted: TOKEN:BIAS, as 50:-2.5") from None


def options(*some: Callable) -> Callable:
    return lambda function: reduce(lambda f, option: option(f), reversed(some), function)


def take(values: dict, names: tuple[str, ...]) -> dict:
    """Remove these options from what click gave, and return them."""
    return {name: values.pop(name) for name in names if name in values}


def engine_config(given: dict, **more: object) -> EngineConfig:
    """Settings from options of `MODEL` and `more`, the environment and the file of --config."""
    settings = {name: value for name, value in (given | more).items() if value is not None}
    return EngineConfig.load(settings.pop("config", None), os.environ, **settings)


def read_lines(file: str) -> list[str]:
    """Prompts of a file, one a line; `-` is standard input. Empty lines are no prompts."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {file!r}: {error}") from error
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{file!r} holds no prompt; accepted: one prompt a line")
    return prompts


def read_requests(file: str) -> list[tuple[str | list[int], SamplingParams]]:
    """Requests of a JSON file: a list of {"prompt": text or token ids, and sampling parameters}."""
    try:
        entries = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read requests from {file!r}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{file!r} holds {type(entries).__name__}; accepted: a list of requests that is not empty"
        )
    requests = []
    for number, entry in enumerate(entries):
        where = f"request {number} of {file!r}"
        if not isinstance(entry, dict) or "prompt" not in entry:
            raise UserError(f"{where} has no prompt; accepted: an object with prompt and sampling parameters")
        how = {name: value for name, value in entry.items() if name != "prompt"}
        if unknown_names := set(how) - set(SAMPLING_NAMES):
            raise UserError(
                f"{where}: unknown {sorted(unknown_names)[0]!r}; accepted: {', '.join(SAMPLING_NAMES)}"
            )
        prompt = entry["prompt"]
        ids = isinstance(prompt, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in prompt)
        if not isinstance(prompt, str) and not ids:
            raise UserError(f"{where}: prompt is {prompt!r}; accepted: text or a list of token ids")
        try:
            requests.append((prompt, SamplingParams(**how)))
        except (UserError, TypeError) as error:
            raise UserError(f"{where}: {error}") from error
    return requests
