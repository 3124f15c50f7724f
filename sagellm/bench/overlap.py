"""Steps of a model on modelled devices and networks, with comm-compute-overlap and without: predictions, not times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sagellm import backends, passes
from sagellm.compiler import Compiler
from sagellm.ir.timeline import Machine, predict, total
from sagellm.models.config import ModelConfig
from sagellm.topology import find

PIPELINE = "shard,cleanup,kernel-fusion"
OVERLAP = "comm-compute-overlap"
TOKENS = {"decode": (1, 64, 256), "prefill": (512, 2048, 8192)}


def predicted(
    model: ModelConfig, dtype: str, topologies: Sequence[str], ranks: Sequence[int], tokens: dict = TOKENS
) -> Iterator[dict]:
    """A step each: milliseconds without and with the pass, the network's part, and what the pass said of the layers."""
    for name in topologies:
        for count in ranks:
            compilers = [
                Compiler(
                    model,
                    backends.load("null"),
                    passes.pipeline(text),
                    dtype,
                    "weak",
                    count,
                    find(name),
                )
                for text in (PIPELINE, f"{PIPELINE},{OVERLAP}")
            ]
            for phase, sizes in tokens.items():
                for size in sizes:
                    yield _step(compilers, name, phase, size)


def _step(compilers: list[Compiler], topology: str, phase: str, tokens: int) -> dict:
    context = compilers[0].context()
    outputs = tokens if phase == "decode" else 1
    machine = Machine.of(context.costs, context.topology, context.ranks, tokens, outputs)
    without, with_ = (compiler.model((phase,), tokens) for compiler in compilers)
    before, after = (total(predict(compiled.graph, machine)) for compiled in (without, with_))
    layers = [r for r in with_.remarks if r.pass_name == OVERLAP and "@layers" in r.where]
    exposed = sum(part.count * part.exposed for part in predict(without.graph, machine))
    return {
        "topology": topology,
        "ranks": context.ranks,
        "phase": phase,
        "tokens": tokens,
        "without_ms": before * 1e3,
        "network_%": 100 * exposed / before,
        "with_ms": after * 1e3,
        "gain_%": 100 * (1 - after / before),
        "layers": "applied" if any(remark.done for remark in layers) else "declined",
        "remark": layers[0].message if layers else "",
    }
