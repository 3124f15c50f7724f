"""The passes: a table of names, resolved on use. Third parties add theirs by the entry-point group below."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sagellm.passes.driver import Pass, Pipeline

ENTRY_POINTS = "sagellm.passes"

PASSES = {
    "prefix-dedup": "sagellm.passes.prefix_dedup:PrefixDedup",
    "speculative-branching": "sagellm.passes.speculative_branching:SpeculativeBranching",
    "kv-eviction-placement": "sagellm.passes.kv_eviction_placement:KVEvictionPlacement",
    "shard": "sagellm.passes.shard:Shard",
    "kernel-fusion": "sagellm.passes.kernel_fusion:KernelFusion",
    "pack-weights": "sagellm.passes.pack_weights:PackWeights",
    "comm-compute-overlap": "sagellm.passes.comm_compute_overlap:CommComputeOverlap",
    "cleanup": "sagellm.passes.cleanup:Cleanup",
}

DEFAULT = "prefix-dedup,speculative-branching,kv-eviction-placement,cleanup,kernel-fusion,pack-weights"
PARALLEL = f"shard,{DEFAULT},comm-compute-overlap"
"""The default where a model is divided among several ranks."""


def _load(path: str) -> type[Pass]:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def registry() -> dict[str, Callable[[], type[Pass]]]:
    """Every pass by name, as a function that imports its class."""
    found: dict[str, Callable[[], type[Pass]]] = {e.name: e.load for e in entry_points(group=ENTRY_POINTS)}
    return found | {name: partial(_load, path) for name, path in PASSES.items()}


def pipeline(text: str | None = None, ranks: int = 1) -> Pipeline:
    """The pipeline that a text describes; None is the default one for so many ranks, an empty text has no passes."""
    from sagellm.passes.driver import parse

    return parse((DEFAULT if ranks == 1 else PARALLEL) if text is None else text, registry)
