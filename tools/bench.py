"""Benchmarks beside what a user would run instead. Timings are ratios of interleaved runs in one process.

    python tools/bench.py decode                    # built-in model and a random one of 0.5B shape
    python tools/bench.py decode --shape 0.5b --dtype float32 --batch 16

Needs transformers (`pip install sagellm[test]`). A 0.5B model of random weights is written to a temporary folder.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import click

from sagellm.batch import Request, SamplingParams
from sagellm.config import EngineConfig
from sagellm.engine.core import EngineCore
from sagellm.models.hub import resolve

SHAPE_05B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
}
"""Qwen2.5-0.5B (config.json on the hub)."""


def random_checkpoint(folder: Path, dtype: str) -> Path:
    """A Qwen2 checkpoint of 0.5B shape; values small enough that nothing overflows."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE_05B, dtype=dtype))
    model = model.to_empty(device="cpu").to(getattr(torch, dtype))
    for name, weight in model.named_parameters():
        weight.data.fill_(1.0) if "norm" in name else weight.data.normal_(0, 0.02)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


class Ours:
    name = "sageLLM"

    def __init__(self, folder: Path, dtype: str, batch: int, length: int):
        config = EngineConfig(model=str(folder), dtype=dtype, max_sequences=batch, max_length=length)
        self.core, self.runs = EngineCore(config), 0

    def __call__(self, prompts: list[list[int]], tokens: int) -> None:
        self.runs += 1
        how = SamplingParams(max_tokens=tokens, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            self.core.submit(Request(f"{self.runs}-{i}", prompt, how))
        while self.core.busy:
            self.core.step()


class Transformers:
    name = "transformers"

    def __init__(self, folder: Path, dtype: str, batch: int, length: int):
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def __call__(self, prompts: list[list[int]], tokens: int) -> None:
        import torch

        ids = torch.tensor(prompts)
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )


def timed(run, prompts: list[list[int]], tokens: int) -> float:
    """Seconds of decoding: `tokens` new tokens less a run that stops at the first."""
    began = time.perf_counter()
    run(prompts, 1)
    first = time.perf_counter()
    run(prompts, tokens)
    return (time.perf_counter() - first) - (first - began)


def compare(folder: Path, dtype: str, batch: int, tokens: int, pairs: int) -> dict:
    """Tokens a second of both, and the median ratio of the pairs. Prompts: 32 different tokens, no sharing."""
    prompts = [[(7 * i + 13 * j) % 4000 + 10 for j in range(32)] for i in range(batch)]
    ours, theirs = (kind(folder, dtype, batch, 64 + tokens) for kind in (Ours, Transformers))
    for run in (ours, theirs):
        run(prompts, 4)
    seconds = [(timed(ours, prompts, tokens), timed(theirs, prompts, tokens)) for _ in range(pairs)]
    made = batch * (tokens - 1)
    return {
        "dtype": dtype,
        "batch": batch,
        "sagellm": made / statistics.median(s[0] for s in seconds),
        "transformers": made / statistics.median(s[1] for s in seconds),
        "ratio": statistics.median(s[1] / s[0] for s in seconds),
        "ratios": [round(s[1] / s[0], 2) for s in seconds],
    }


@click.group()
def main() -> None:
    """Benchmarks of sageLLM beside other engines."""


@main.command()
@click.option("--shape", multiple=True, type=click.Choice(["builtin", "0.5b"]), default=("builtin", "0.5b"))
@click.option("--dtype", "dtypes", multiple=True, default=("bfloat16", "float32"))
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 16))
@click.option("--tokens", type=int, default=32, help="New tokens per sequence.")
@click.option("--pairs", type=int, default=3, help="Interleaved runs of both.")
@click.option("--json", "as_json", is_flag=True)
def decode(shape, dtypes, batches, tokens: int, pairs: int, as_json: bool) -> None:
    """Tokens a second of greedy decoding behind prompts of 32 tokens, beside transformers' `generate`."""
    if not as_json:
        click.echo(
            f"{'model':<9}{'dtype':<10}{'batch':>5}{'sageLLM tok/s':>15}{'transformers':>14}{'ratio':>7}"
        )
    for name in shape:
        with tempfile.TemporaryDirectory() as scratch:
            for dtype in dtypes:
                folder = (
                    resolve("builtin")
                    if name == "builtin"
                    else random_checkpoint(Path(scratch) / dtype, dtype)
                )
                for batch in batches:
                    got = {"model": name} | compare(folder, dtype, batch, tokens, pairs)
                    if as_json:
                        click.echo(json.dumps(got))
                        continue
                    click.echo(
                        f"{name:<9}{dtype:<10}{batch:>5}{got['sagellm']:>15.1f}{got['transformers']:>14.1f}"
                        f"{got['ratio']:>7.2f}  pairs {got['ratios']}"
                    )


if __name__ == "__main__":
    main()
