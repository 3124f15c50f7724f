"""From a checkpoint to runtime weights, by the emitted weights program."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch

from sagellm.backends.plan import Program
from sagellm.models.checkpoint import Checkpoint

Progress = Callable[[str, int, int], None]
"""(what, done, of)"""


def load_weights(
    program: Program,
    checkpoint: Checkpoint,
    expected: dict,
    progress: Progress | None = None,
    *,
    rank: int = 0,
    ranks: int = 1,
    device: str = "cpu",
) -> SimpleNamespace:
    """Run the emitted weights program over a checkpoint whose tensors have been checked; see `weights.tensor`.

    Each tensor goes to the device as it is read.
    """
    checkpoint.check(expected)
    done = 0

    def read(name: str, dtype: torch.dtype, dim: int = 0, parts: int = 1, once: bool = False) -> torch.Tensor:
        nonlocal done
        done += 1
        if progress:
            progress("weights", done, len(expected))
        if once and rank:
            return torch.zeros(expected[name], dtype=dtype, device=device)
        if parts > 1:
            return checkpoint.read_part(name, dim, rank * parts // ranks, parts).to(device, dtype)
        return checkpoint.read(name).to(device, dtype)

    with torch.inference_mode():
        return program["load"](read)
