"""`sagellm bench overlap` and `sagellm bench collectives`: ranks and the network between them."""

from __future__ import annotations

import click

from sagellm.models.config import ModelConfig, RopeConfig, load_config
from sagellm.models.hub import resolve
from sagellm.topology import TOPOLOGIES, find

MODELLED = ("hccs", "pcie")
LAYERS = 32
LLAMA_8B = ModelConfig(
    name="the shape of Llama-3-8B",
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=LAYERS,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    rope=RopeConfig(theta=500000.0, rotary_dim=128, original_max_positions=8192),
    max_positions=8192,
    tie_embeddings=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    windows=(None,) * LAYERS,
    dtype="bfloat16",
    bos_token_id=None,
    eos_token_ids=(),
    pad_token_id=None,
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, one line a result.")


@click.command()
@click.option(
    "--model", "-m", help="Folder or hub name; weights are not read.  [default: the shape of Llama-3-8B]"
)
@click.option("--topology", "topologies", multiple=True, default=MODELLED, show_default=True,
              help=f"{', '.join(TOPOLOGIES)}; hccs@50 for 50 GB/s a link. May be given often.")  # fmt: skip
@click.option("--ranks", type=click.IntRange(2), multiple=True, default=(2, 4, 8), show_default=True,
              help="May be given often.")  # fmt: skip
@JSON
def overlap(model: str | None, topologies, ranks, as_json: bool) -> None:
    """Predicted steps with comm-compute-overlap and without, on modelled devices and networks."""
    from sagellm.bench.overlap import predicted
    from sagellm.bench.report import show

    config = load_config(resolve(model), model) if model else LLAMA_8B
    results = list(predicted(config, config.dtype, topologies, ranks))
    if not as_json:
        click.echo(f"Predicted, not measured: one step of {config.name}, {config.dtype}.")
        for name in topologies:
            topology = find(name)
            click.echo(f"  {topology}; devices: {topology.costs.source if topology.costs else 'the backend'}")
    names = ("topology", "ranks", "phase", "tokens", "without_ms", "network_%", "with_ms", "gain_%", "layers")
    show(results, names, as_json)


@click.command()
@click.option("--ranks", type=click.IntRange(2), default=2, show_default=True)
@JSON
def collectives(ranks: int, as_json: bool) -> None:
    """All-reduces of gloo between processes of this machine, and the alpha-beta model fitted to them."""
    from sagellm.bench.collectives import measured
    from sagellm.bench.report import show

    results = measured(ranks)
    show(results, ("bytes", "all_reduce_us", "model_us", "latency_us", "bandwidth_GBps"), as_json)
