"""Logprobs of a step's tokens and of prompts, for the rows that ask for them."""

from __future__ import annotations

import numpy as np
import torch

from sagellm.backends import sampling
from sagellm.batch import Columns
from sagellm.runtime.executor import StepOutcome

Top = tuple[tuple[int, float], ...]
"""Likeliest tokens and their logprobs, best first."""


def of_tokens(outcome: StepOutcome, columns: Columns) -> dict[int, tuple[float, Top]]:
    """By output row that asks: the logprob of its token, and the likeliest ones with theirs."""
    wanted = np.flatnonzero(columns.logprobs[outcome.rows] >= 0)
    if not len(wanted):
        return {}
    counts = columns.logprobs[outcome.rows[wanted]]
    return dict(zip(wanted.tolist(), _logprobs(outcome.logits[wanted], outcome.tokens[wanted], counts)))


def of_prompts(outcome: StepOutcome, columns: Columns) -> dict[int, list[tuple[int, float, Top]]]:
    """By request number: position, logprob and likeliest ones of each prompt token behind what was forwarded."""
    rows, positions = outcome.prompt_rows, outcome.prompt_positions + 1
    found: dict[int, list[tuple[int, float, Top]]] = {}
    if len(rows):
        told = _logprobs(
            outcome.prompt_logits, columns.tokens[rows, positions], columns.prompt_logprobs[rows]
        )
        for number, position, one in zip(columns.number[rows].tolist(), positions.tolist(), told):
            found.setdefault(number, []).append((position, *one))
    return found


def _logprobs(logits: torch.Tensor, tokens: np.ndarray, counts: np.ndarray) -> list[tuple[float, Top]]:
    most = min(int(counts.max()), logits.shape[1])
    chosen, ids, values = sampling.logprobs(
        logits, torch.from_numpy(tokens.astype(np.int64)).to(logits.device), most
    )
    columns = zip(chosen.tolist(), ids.tolist(), values.tolist(), counts.tolist())
    return [(one, tuple(zip(i[:count], v[:count]))) for one, i, v, count in columns]
