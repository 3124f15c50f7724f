"""What passes gain: the same engine with and without one, as ratios of interleaved runs in one process.

    python tools/bench_passes.py attention     # decode attention over a shared beginning, beside contiguous SDPA
    python tools/bench_passes.py cascade       # a whole decode step of 0.5B shape with reading together, and without
    python tools/bench_passes.py fusion        # calls per layer and tokens a second, every model family
    python tools/bench_passes.py int8          # a decode step over int8 keys and values, beside bfloat16

Needs transformers (`pip install sagellm[test]`). Models of random weights are written to a temporary folder.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import torch
from bench import SHAPE_05B, Ours
from torch.nn.functional import scaled_dot_product_attention

from sagellm.backends.aten import kernels
from sagellm.backends.aten.columns import AtenRows
from sagellm.backends.aten.int8 import int8 as int8_cache
from sagellm.backends.aten.int8 import quantized
from sagellm.backends.cpu import native
from sagellm.batch import Request, SamplingParams
from sagellm.config import EngineConfig
from sagellm.engine.core import EngineCore
from sagellm.rows import build_rows

FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral")
SMALL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
PLAIN = "prefix-dedup,cleanup,kernel-fusion,pack-weights"
"""Without guesses, so that all sequences get a token in each step."""
WITHOUT = {"cascade": "cleanup,kernel-fusion,pack-weights", "fusion": "prefix-dedup,cleanup,pack-weights"}


def checkpoint(folder: Path, family: str, shape: dict) -> Path:
    """A float32 model of this family, of small random weights."""
    import transformers

    torch.manual_seed(0)
    extra = {"head_dim": shape["hidden_size"] // shape["num_attention_heads"]} if family == "Qwen3" else {}
    config = getattr(transformers, f"{family}Config")(**shape, **extra, eos_token_id=None)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, weight in model.named_parameters():
        weight.data.fill_(1.0) if "norm" in name else weight.data.normal_(0, 0.02)
    model.save_pretrained(folder)
    return folder


def interleaved(pairs: int, **functions: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each function, run one after the other `pairs` times after a first time that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(pairs + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> str:
    pairs = [a / b for a, b in zip(seconds[slow], seconds[fast])]
    return f"{slow} / {fast} {statistics.median(pairs):.2f} (of {min(pairs):.2f} to {max(pairs):.2f})"


@click.group()
@click.option("--threads", type=int, default=torch.get_num_threads())
def main(threads: int) -> None:
    """What passes gain."""
    torch.set_num_threads(threads)


@main.command()
@click.option("--rows", type=int, default=32)
@click.option("--prefix", type=int, default=4096, help="Tokens that all rows share.")
@click.option("--own", type=int, default=32, help="Tokens of each row behind them.")
@click.option("--heads", type=int, default=14)
@click.option("--kv-heads", type=int, default=2)
@click.option("--head-dim", type=int, default=64)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--pairs", type=int, default=9)
def attention(rows, prefix, own, heads, kv_heads, head_dim, dtype, pairs) -> None:
    """Attention alone, one layer: contiguous SDPA, stock torch over blocks, native, over int8, and reading together."""
    block, kind = 16, getattr(torch, dtype)
    shared, each = prefix // block, -(-own // block)
    order = np.random.default_rng(0).permutation(shared + rows * each) + 1
    table = np.concatenate([np.tile(order[:shared], (rows, 1)), order[shared:].reshape(rows, each)], 1)
    kv = torch.randn(2, len(order) + 1, block, kv_heads, head_dim).to(kind)
    q, length, scale = torch.randn(rows, heads * head_dim).to(kind), shared * block + own, head_dim**-0.5
    nothing = np.zeros(0, np.int64)
    columns = AtenRows(
        SimpleNamespace(  # type: ignore[arg-type]
            decode_blocks=table,
            decode_lengths=np.full(rows, length),
            cohort_rows=np.arange(rows),
            cohort_offsets=np.array([0, rows]),
            cohort_common=np.array([shared * block]),
            prefill_lengths=nothing,
            prefill_offsets=np.array([rows]),
            kv_source=None,
            trees=None,
            **dict.fromkeys(("tokens", "positions", "lengths", "slots", "outputs"), nothing),
        ),
        block,
    )
    k, v = (
        x[torch.from_numpy(table)].flatten(1, 2)[:, :length].transpose(1, 2).contiguous() for x in kv.unbind()
    )
    grouped = q.view(rows, kv_heads, -1, head_dim)
    cache, small = (kv[0], kv[1]), int8_cache((quantized(kv[0]), quantized(kv[1])), kind)
    alone = native.decode_attention(q, cache, columns, scale).float()
    together = native.cascade_attention(q, cache, columns, scale).float()
    seconds = interleaved(
        pairs,
        sdpa=lambda: scaled_dot_product_attention(grouped, k, v, scale=scale),
        stock=lambda: kernels.decode_attention(q, cache, columns, scale),
        alone=lambda: native.decode_attention(q, cache, columns, scale),
        int8=lambda: native.decode_attention(q, small, columns, scale),
        together=lambda: native.cascade_attention(q, cache, columns, scale),
    )
    flops = 4 * rows * heads * head_dim * length
    for name, times in seconds.items():
        best = min(times)
        click.echo(
            f"{name:<10}{statistics.median(times) * 1e3:>8.1f} ms{flops / best / 1e9:>8.1f} GFLOP/s at best"
        )
    click.echo(f"{ratio(seconds, 'sdpa', 'alone')}; {ratio(seconds, 'alone', 'together')}")
    click.echo(ratio(seconds, "alone", "int8"))
    click.echo(f"largest difference {(alone - together).abs().max():.1e}")


@main.command()
@click.option("--layers", type=int, default=SHAPE_05B["num_hidden_layers"])
@click.option("--rows", type=int, default=32)
@click.option("--prefix", type=int, default=4096)
@click.option("--pairs", type=int, default=5)
def cascade(layers: int, rows: int, prefix: int, pairs: int) -> None:
    """One decode step of Qwen2.5-0.5B's shape in float32, over a prompt that all rows share."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint(Path(scratch), "Qwen2", SHAPE_05B | {"num_hidden_layers": layers})
        config = EngineConfig(
            model=str(folder), dtype="float32", max_sequences=rows, max_length=prefix + 64, pipeline=PLAIN
        )
        core = EngineCore(config)
    common = np.random.default_rng(0).integers(0, 150000, prefix).tolist()
    for row in range(rows):
        how = SamplingParams(max_tokens=40, ignore_eos=True)
        core.submit(Request(str(row), [*common, 10 + row], how))
    while True:
        core.step()
        batch = core.schedule()
        if len(batch.decode) == rows:
            break
    click.echo(f"forwarded {core.counters.forwarded} tokens so far; {batch.notes or batch.declines}")
    core.kv.pool.extend(core.columns, batch.decode)
    runs = {}
    for name, words in (("alone", ("decode",)), ("together", ("decode", "cascade"))):
        columns = core.backend.upload(build_rows(batch, cascade="cascade" in words), config.block_size)
        program = core.compiler.model(words).program
        runs[name] = lambda f=program["model"], columns=columns: f(core.weights, core.cache, columns)
    with torch.inference_mode():
        alone = runs["alone"]()
        difference, largest = (alone - runs["together"]()).abs().max(), alone.abs().max()
        seconds = interleaved(pairs, **runs)
    for name, times in seconds.items():
        click.echo(f"{name:<10}{statistics.median(times) * 1e3:>9.1f} ms")
    click.echo(
        f"{ratio(seconds, 'alone', 'together')}; largest difference of a logit {difference:.1e}, "
        f"{difference / largest:.1e} of the largest logit"
    )


@main.command()
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 8))
@click.option("--tokens", type=int, default=32)
@click.option("--pairs", type=int, default=5)
def fusion(batches, tokens: int, pairs: int) -> None:
    """Calls per layer, and tokens a second of greedy decoding, with kernel-fusion and without."""
    click.echo(f"{'family':<9}{'batch':>5}{'calls':>7}{'fused':>7}{'tok/s':>9}{'fused':>9}")
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = checkpoint(Path(scratch), family, SMALL)
            engines = {}
            for name, pipeline in (("plain", WITHOUT["fusion"]), ("fused", PLAIN)):
                ours = Ours.__new__(Ours)
                config = EngineConfig(
                    model=str(folder), dtype="float32", pipeline=pipeline, max_sequences=8, max_length=256
                )
                ours.core, ours.runs = EngineCore(config), 0
                engines[name] = ours
        for batch in batches:
            prompts = [[(7 * i + 13 * j) % 4000 + 10 for j in range(8)] for i in range(batch)]
            runs = {name: partial(ours, prompts, tokens) for name, ours in engines.items()}
            seconds = interleaved(pairs, **runs)
            programs = [ours.core.compiler.model(("decode",)).program for ours in engines.values()]
            calls = [next(n for f, n in p.calls.items() if f.startswith("layers")) for p in programs]
            rates = [batch * tokens / statistics.median(times) for times in seconds.values()]
            click.echo(
                f"{family:<9}{batch:>5}{calls[0]:>7}{calls[1]:>7}{rates[0]:>9.1f}{rates[1]:>9.1f}  "
                f"{ratio(seconds, 'plain', 'fused')}"
            )


@main.command()
@click.option("--rows", type=int, default=16)
@click.option("--length", type=int, default=1800, help="Tokens of each prompt, which no rows share.")
@click.option("--pairs", type=int, default=60)
def int8(rows: int, length: int, pairs: int) -> None:
    """Decode steps of the built-in model in bfloat16, over keys and values in bfloat16 and in int8."""
    prompts = np.random.default_rng(0).integers(10, 4000, (rows, length)).tolist()
    cores = {
        kv: EngineCore(
            EngineConfig(model="builtin", kv_dtype=kv, max_sequences=rows, pipeline=PLAIN, max_length=2048)
        )
        for kv in ("bfloat16", "int8")
    }
    for kv, core in cores.items():
        click.echo(f"{kv:<10}{core.kv_schema.bytes_per_block // core.kv_schema.block_size:>6} bytes a token")
        for row, prompt in enumerate(prompts):
            core.submit(Request(str(row), prompt, SamplingParams(max_tokens=248, ignore_eos=True)))
        while core.counters.forwarded < rows * length:
            core.step()
    seconds = interleaved(pairs, **{kv: core.step for kv, core in cores.items()})
    for kv, times in seconds.items():
        click.echo(f"{kv:<10}{statistics.median(times) * 1e3:>8.1f} ms a step of {rows} rows")
    click.echo(ratio(seconds, "bfloat16", "int8"))


if __name__ == "__main__":
    main()
