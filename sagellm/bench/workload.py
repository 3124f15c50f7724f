"""What is asked of an engine: requests with lengths and arrival times, drawn at random or read from a trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from attrs import frozen

from sagellm.errors import UserError

FIRST_TOKEN = 10
"""Lower ids are often special."""


@frozen
class Arrival:
    """One request of a workload."""

    at: float
    """Seconds from the start."""
    prompt: list[int]
    output: int
    """Tokens to generate; end tokens are ignored."""


def uniform(
    count: int, rate: float, prompt: tuple[int, int], output: tuple[int, int], vocabulary: int, seed: int
) -> list[Arrival]:
    """Random prompts that share nothing, with lengths between the bounds, arriving as a Poisson process of `rate` a
    second; all at once where the rate is 0."""
    random = np.random.default_rng(seed)
    gaps = random.exponential(1 / rate, count) if rate else np.zeros(count)
    prompts = random.integers(prompt[0], prompt[1] + 1, count)
    outputs = random.integers(output[0], output[1] + 1, count)
    return [
        Arrival(float(at), random.integers(FIRST_TOKEN, vocabulary, length).tolist(), int(made))
        for at, length, made in zip(np.cumsum(gaps) - gaps[:1], prompts.tolist(), outputs.tolist())
    ]


@frozen
class TraceRow:
    """A request of a recorded trace, in the form of Mooncake's (Qin et al., FAST 2025)."""

    timestamp: float
    """Milliseconds from the start."""
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]
    """One for each block of the prompt; equal ids stand for equal beginnings up to there."""
    tenant: str = ""
    """Whose request it is; those of different tenants share nothing."""
    grammar: bool = False
    """Its output has a form."""


def read_trace(path: Path, limit: int | None = None) -> list[TraceRow]:
    """JSON lines with `timestamp`, `input_length`, `output_length` and `hash_ids`, some with `tenant` or `grammar`."""
    rows: list[TraceRow] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(rows) == limit:
                    break
                rows.append(_row(line, f"line {number} of {str(path)!r}"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read a trace from {str(path)!r}: {error}") from error
    if not rows:
        raise UserError(f"{str(path)!r} holds no request; accepted: JSON lines")
    return rows


def _row(line: str, where: str) -> TraceRow:
    accepted = "accepted: an object with timestamp, input_length, output_length and hash_ids"
    try:
        entry = json.loads(line)
        row = TraceRow(
            float(entry["timestamp"]),
            int(entry["input_length"]),
            int(entry["output_length"]),
            tuple(map(int, entry["hash_ids"])),
            str(entry.get("tenant", "")),
            bool(entry.get("grammar", False)),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is no request ({type(error).__name__}: {error}); {accepted}") from error
    if row.input_length < 1 or row.output_length < 1 or not row.hash_ids:
        raise UserError(f"{where} has no tokens; {accepted}, each of at least one")
    return row


def replayed(
    rows: Sequence[TraceRow], rate: float, block: int, longest: int, vocabulary: int, seed: int
) -> list[Arrival]:
    """The trace's requests, scaled to an engine: each block of the trace becomes `block` tokens, so that what is shared
    stays shared; outputs shrink alike; prompts are cut to leave room for their output within `longest` tokens. Times
    are scaled to `rate` requests a second; all come at once where it is 0."""
    scale = block / max(-(-r.input_length // len(r.hash_ids)) for r in rows)
    span = (rows[-1].timestamp - rows[0].timestamp) / 1e3
    pace = (len(rows) - 1) / rate / span if rate and span > 0 else 0.0
    arrivals = []
    for row in rows:
        output = min(max(1, int(row.output_length * scale)), longest // 2)
        length = min(max(1, int(row.input_length * scale)), longest - output)
        at = (row.timestamp - rows[0].timestamp) / 1e3 * pace
        arrivals.append(Arrival(at, _tokens(row, length, block, vocabulary, seed), output))
    return arrivals


def _tokens(row: TraceRow, length: int, block: int, vocabulary: int, seed: int) -> list[int]:
    """Tokens of a prompt: each block's are a function of its id."""
    blocks = (
        np.random.default_rng((seed, identity)).integers(FIRST_TOKEN, vocabulary, block)
        for identity in row.hash_ids
    )
    return np.concatenate(list(blocks))[:length].tolist()
