"""gloo between processes of this machine: all-reduces of several sizes, and the link that would explain their times.

`python -m sagellm.bench.collectives PORT RANK RANKS` is a rank other than the first.
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

import numpy as np
import torch

from sagellm.backends.comm import Gloo, open_store
from sagellm.engine.ranks import share_cores

SIZES = tuple(4**n for n in range(4, 13))
"""Bytes: 256 to 16 MiB."""
REPEATS = 15


def measured(ranks: int) -> list[dict]:
    """Median microseconds of an all-reduce of each size, and what the fitted alpha-beta model says."""
    store = open_store(ranks)
    others = [
        subprocess.Popen(
            [sys.executable, "-m", "sagellm.bench.collectives", str(store.port), str(r), str(ranks)]
        )
        for r in range(1, ranks)
    ]
    try:
        times = _run(store.port, 0, ranks)
    finally:
        for process in others:
            process.wait()
    latency, bandwidth = fitted(ranks, times)
    return [
        {
            "bytes": size,
            "all_reduce_us": taken * 1e6,
            "model_us": 2 * (ranks - 1) * (latency + size / ranks / bandwidth) * 1e6,
            "latency_us": latency * 1e6,
            "bandwidth_GBps": bandwidth / 1e9,
        }
        for size, taken in times.items()
    ]


def fitted(ranks: int, times: dict[int, float]) -> tuple[float, float]:
    """(latency, bandwidth) of a ring whose all-reduces take these times: least squares of the relative error."""
    sizes, taken = np.array([*times]), np.array([*times.values()])
    rounds = 2 * (ranks - 1)
    columns = np.stack([np.full(len(sizes), rounds), rounds * sizes / ranks], axis=1) / taken[:, None]
    latency, inverse = np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)[0]
    return float(latency), float(1 / inverse)


def _run(port: int, rank: int, ranks: int) -> dict[int, float]:
    share_cores(ranks)
    gloo, times = Gloo(port, rank, ranks), {}
    for size in SIZES:
        x, taken = torch.ones(size // 4), []
        for _ in range(REPEATS):
            began = time.perf_counter()
            gloo.all_reduce(x)
            taken.append(time.perf_counter() - began)
        times[size] = median(taken)
    return times


if __name__ == "__main__":
    _run(*map(int, sys.argv[1:4]))
