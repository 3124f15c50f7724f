"""`sagellm bench`: an engine measured as its users meet it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from sagellm.cli.options import MODEL, MODEL_NAMES, engine_config, options, take
from sagellm.engine.engine import SageLLMEngine
from sagellm.errors import UserError, unknown

ENGINE = (
    click.option("--max-sequences", type=int, help="Sequences that run at once.  [default: 64]"),
    click.option("--core", help="inline, or process for a core of its own.  [default: inline]"),
)
RANGE = "LOW:HIGH"


class _Lengths(click.ParamType):
    name = RANGE

    def convert(self, value, param, ctx) -> tuple[int, int]:
        low, _, high = str(value).partition(":")
        try:
            bounds = int(low), int(high or low)
        except ValueError:
            bounds = 0, 0
        if not 1 <= bounds[0] <= bounds[1]:
            raise UserError(f"{param.opts[0]} is {value!r}; accepted: tokens, or LOW:HIGH")
        return bounds


LENGTHS = (
    click.option("--prompt", type=_Lengths(), default="128", show_default=True, help="Tokens of a prompt."),
    click.option("--output", type=_Lengths(), default="32", show_default=True, help="Tokens to generate."),
)
JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, one line a result, with all figures."
)
SEED = click.option("--seed", type=int, default=0, help="Of lengths, tokens and arrival times.")
ELSEWHERE = {
    "fleet": "sagellm.cli.bench_routing:fleet",
    "http": "sagellm.cli.bench_http:http",
    "kv": "sagellm.cli.bench_kv:kv",
    "overlap": "sagellm.cli.bench_ranks:overlap",
    "collectives": "sagellm.cli.bench_ranks:collectives",
    "route": "sagellm.cli.bench_routing:route",
    "speculation": "sagellm.cli.bench_speculation:speculation",
}
"""Sub-commands with a module of their own."""


class _Benchmarks(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*self.commands, *ELSEWHERE})

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        if name in ELSEWHERE:
            module, _, attribute = ELSEWHERE[name].partition(":")
            return getattr(import_module(module), attribute)
        found = super().get_command(ctx, name)
        if found is None:
            raise unknown("benchmark", name, self.list_commands(ctx))
        return found


@click.group(cls=_Benchmarks)
def bench() -> None:
    """Measure an engine: latency, throughput, serving under load, and its own work beside the model."""


def _engine(given: dict) -> tuple[SageLLMEngine, int]:
    """The engine, and how many tokens its model knows."""
    names = (*MODEL_NAMES, "max_sequences", "core")
    engine = SageLLMEngine(config=engine_config(take(given, names)))
    return engine, engine.vocab_size


@bench.command()
@options(*MODEL, *ENGINE, *LENGTHS)
@click.option("--repeats", type=click.IntRange(1), default=10, show_default=True)
@click.option(
    "--behind", type=click.IntRange(1), help="Also: a short request behind a prompt of so many tokens."
)
@JSON
def latency(prompt, output, repeats: int, behind: int | None, as_json: bool, **given) -> None:
    """One request at a time: TTFT, TPOT, and the time between tokens."""
    from sagellm.bench import latency as measure
    from sagellm.bench.report import show

    engine, vocabulary = _engine(given)
    with engine:
        run = measure.alone(engine, prompt[1], output[1], repeats, vocabulary)
        head = {"prompt": prompt[1], "output": output[1]}
        show(
            [head | run.summary()],
            (*head, "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "itl_p50_ms", "itl_p99_ms", "e2e_p50_ms"),
            as_json,
        )
        if behind:
            found = measure.behind(engine, behind, repeats, vocabulary)
            show([found], tuple(found), as_json)


@bench.command()
@options(*MODEL, *ENGINE, *LENGTHS)
@click.option("--requests", type=click.IntRange(1), default=64, show_default=True)
@SEED
@JSON
def throughput(prompt, output, requests: int, seed: int, as_json: bool, **given) -> None:
    """All requests at once: tokens a second."""
    from sagellm.bench.measure import serve
    from sagellm.bench.report import show
    from sagellm.bench.workload import uniform

    engine, vocabulary = _engine(given)
    with engine:
        serve(engine, uniform(2, 0, (8, 8), (4, 4), vocabulary, seed + 1))
        run = serve(engine, uniform(requests, 0, prompt, output, vocabulary, seed))
    show(
        [run.summary()],
        (
            "requests",
            "seconds",
            "requests_per_s",
            "prompt_tokens_per_s",
            "output_tokens_per_s",
            "tpot_p50_ms",
        ),
        as_json,
    )


@bench.command("serve")
@options(*MODEL, *ENGINE, *LENGTHS)
@click.option("--rate", "rates", type=click.FloatRange(0, min_open=True), multiple=True, default=(1.0,),
              show_default=True, help="Requests a second; give it several times for several loads.")  # fmt: skip
@click.option("--requests", type=click.IntRange(1), default=64, show_default=True, help="For each load.")
@click.option("--trace", type=click.Path(path_type=Path), help="Replay a trace: JSON lines of timestamp, "
              "input_length, output_length, hash_ids. Its blocks become KV blocks; times go by --rate.")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path), help="Write a PNG of latency over load.")
@SEED
@JSON
def serve_(prompt, output, rates, requests: int, trace, plot, seed: int, as_json: bool, **given) -> None:
    """Requests that arrive by themselves: latency over load."""
    from sagellm.bench import report
    from sagellm.bench.measure import serve
    from sagellm.bench.workload import read_trace, replayed, uniform

    rows = read_trace(trace, requests) if trace else None
    results = []
    engine, vocabulary = _engine(given)
    with engine:
        serve(engine, uniform(2, 0, (8, 8), (4, 4), vocabulary, seed + 1))
        for rate in rates:
            engine.reset_prefix_cache()
            if rows is None:
                arrivals = uniform(requests, rate, prompt, output, vocabulary, seed)
            else:
                block, longest = (
                    engine.get_kv_schema().block_size,
                    engine.get_capability().max_sequence_length,
                )
                arrivals = replayed(rows, rate, block, longest, vocabulary, seed)
            results.append({"rate": rate} | serve(engine, arrivals).summary())
    report.show(
        results,
        ("rate", "requests", "refused", "requests_per_s", "output_tokens_per_s", "cached",
         "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "itl_p99_ms"),
        as_json,
    )  # fmt: skip
    if plot:
        title = f"{engine.model_id} on {engine.get_capability().backend}, {requests} requests a point"
        report.plot(plot, results, ("ttft", "tpot", "itl"), title)
        if not as_json:
            click.echo(f"wrote {plot}")


@bench.command()
@click.option("--sequences", type=click.IntRange(1), multiple=True, default=(256, 1024), show_default=True)
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True)
@JSON
def host(sequences, steps: int, as_json: bool) -> None:
    """The engine's own work in a step of steady decode: microseconds and calls, on the null backend."""
    from sagellm.bench.host import steady
    from sagellm.bench.report import show

    results = [steady(rows, steps) for rows in sequences]
    show(results, tuple(results[0]), as_json)
