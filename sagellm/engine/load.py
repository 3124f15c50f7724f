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
    program: Program, checkpoint: Checkpoint, expected: dict, progress: Progress | None = None
) -> SimpleNamespace:
    """Run the emitted weights program over a checkpoint whose tensors have been checked."""
    checkpoint.check(expected)
    done = 0

    def read(name: str, dtype: torch.dtype) -> torch.Tensor:
        nonlocal done
        done += 1
        if progress:
            progress("weights", done, len(expected))
        return checkpoint.read(name).to(dtype)

    with torch.inference_mode():
        return program["load"](read)
