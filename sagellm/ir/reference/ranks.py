"""A graph on N ranks in lockstep: a thread a rank, which meet at every collective. No process, no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import Any

import torch
from torch import Tensor

from sagellm.errors import UserError
from sagellm.ir.graph import IRGraph
from sagellm.ir.reference.evaluate import evaluate_model
from sagellm.ir.reference.values import Cache, Exchange, LogicalRows, Observe, Weights

SECONDS = 60.0
"""Ranks that have not met by then never will: one is past its last collective."""


class _Meeting:
    """Where the ranks bring their tensors; each gets all."""

    def __init__(self, ranks: int):
        self._tensors: list[Any] = [None] * ranks
        self._barrier = Barrier(ranks)

    def exchange(self, rank: int) -> Exchange:
        def meet(group: str, x: Tensor) -> tuple[int, list[Tensor]]:
            self._tensors[rank] = x
            self._barrier.wait(SECONDS)
            found = list(self._tensors)
            self._barrier.wait(SECONDS)
            return rank, found

        return meet

    def leave(self) -> None:
        """A rank will not come any more."""
        self._barrier.abort()


def on_ranks(ranks: int, work: Callable[[int, Exchange], Any]) -> list[Any]:
    """`work(rank, exchange)` of every rank; the first error of one of them is raised."""
    meeting = _Meeting(ranks)

    def run(rank: int) -> Any:
        try:
            with torch.inference_mode(torch.is_inference_mode_enabled()):
                return work(rank, meeting.exchange(rank))
        except BaseException:
            meeting.leave()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(run, rank) for rank in range(ranks)]
        errors = [e for e in (future.exception() for future in futures) if e is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, BrokenBarrierError)), None) or UserError(
            "the ranks do not come to the same collectives"
        )
    return [future.result() for future in futures]


def evaluate_ranks(
    graph: IRGraph,
    weights: Sequence[Weights],
    rows: LogicalRows,
    caches: Sequence[Cache],
    *,
    exact: bool = False,
    observe: Observe | None = None,
) -> list[Tensor]:
    """Logits of `@model` on every rank, each with its weights and its cache. `observe` sees those of rank 0."""
    return on_ranks(
        len(weights),
        lambda rank, exchange: evaluate_model(
            graph,
            weights[rank],
            rows,
            caches[rank],
            exact=exact,
            observe=None if rank else observe,
            exchange=exchange,
        ),
    )


def shard_cache(cache: Cache, heads: int, ranks: int) -> list[Cache]:
    """Each rank's part of a cache: `heads` of its KV heads. Fewer parts than ranks are held by several each."""

    def part(x: Tensor, rank: int) -> Tensor:
        parts = x.shape[1] // heads
        return x.chunk(parts, dim=1)[rank * parts // ranks]

    return [
        {
            row: {layer: (part(k, rank), part(v, rank)) for layer, (k, v) in layers.items()}
            for row, layers in cache.items()
        }
        for rank in range(ranks)
    ]


def whole_cache(caches: Sequence[Cache], total: int) -> Cache:
    """The cache of `total` KV heads whose parts these are."""

    def whole(parts: list[Tensor]) -> Tensor:
        count = total // parts[0].shape[1]
        return torch.cat([parts[part * len(parts) // count] for part in range(count)], dim=1)

    return {
        row: {
            layer: tuple(whole([cache[row][layer][i] for cache in caches]) for i in (0, 1))
            for layer in layers
        }
        for row, layers in caches[0].items()
    }  # type: ignore[misc]
