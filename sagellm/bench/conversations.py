"""Made traces: conversations of some turns behind shared system prompts, documents read once, and bursts of agents."""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from attrs import frozen

from sagellm.bench.workload import TraceRow

BLOCK = 512
"""Tokens of a block."""
SYSTEM_PROMPTS = (2, 5, 1, 12, 3)
"""Blocks of each; the first are the most usual."""


@frozen
class Habits:
    """How a tenant's chats go."""

    name: str
    last: float
    """Chance of a turn to be the last."""
    slow: float
    """Its pauses are so many times as long."""
    grammar: bool
    """Its agents want answers by a grammar."""


ALONE = (Habits("", 0.3, 1.0, False),)
TENANTS = (
    Habits("eager", 0.1, 1.0, True),
    Habits("hasty", 0.2, 0.3, False),
    Habits("patient", 0.3, 4.0, True),
    Habits("once", 0.95, 1.0, False),
)


def conversations(requests: int, seed: int, tenants: Sequence[Habits] = ALONE) -> list[TraceRow]:
    """So many requests, about three a second; all tenants send as many.

    Half of what begins are chats: 1 + geometric turns behind a system prompt, 5 to 90 s (log-normal) apart. A third
    are documents, long and read once. The rest are agents: 4 to 24 calls, 1 to 4 s apart, each of which adds a block
    or so. Some come in bursts.
    """
    random = np.random.default_rng(seed)
    queue: list[tuple[float, int, str, Habits, list[int], int]] = []
    names = iter(range(1 << 60))
    systems = {
        who.name: [[next(names) for _ in range(blocks)] for blocks in SYSTEM_PROMPTS] for who in tenants
    }
    rows: list[TraceRow] = []
    at, number = 0.0, 0

    def fresh(blocks: float) -> list[int]:
        return [next(names) for _ in range(max(1, int(blocks)))]

    def begin(at: float) -> None:
        nonlocal number
        who = tenants[number % len(tenants)]
        number += 1
        system = systems[who.name][min(random.geometric(0.5) - 1, len(SYSTEM_PROMPTS) - 1)]
        kind = random.choice(["chat", "document", "agent"], p=[0.5, 0.33, 0.17])
        if kind == "document":
            prompt, turns = fresh(min(100, random.lognormal(3, 0.8))), 1
        elif kind == "agent":
            prompt, turns = system + fresh(random.lognormal(1.5, 0.5)), int(random.integers(4, 25))
        else:
            prompt, turns = system + fresh(random.lognormal(1.0, 0.9)), int(random.geometric(who.last))
        heapq.heappush(queue, (at, number, kind, who, prompt, turns))

    while len(rows) < requests:
        if not queue or queue[0][0] > at:
            at += random.exponential(0.8)
            for _ in range(int(random.integers(5, 20)) if random.random() < 0.01 else 1):
                begin(at)
            continue
        when, which, kind, who, prompt, turns = heapq.heappop(queue)
        output = int(min(2000, 1 + random.lognormal(5, 1)))
        length = len(prompt) * BLOCK
        form = who.grammar and kind == "agent"
        rows.append(TraceRow(float(round(when * 1e3)), length, output, tuple(prompt), who.name, form))
        if turns > 1:
            if kind == "agent":
                wait = random.uniform(1, 4)
            else:
                wait = who.slow * float(np.clip(random.lognormal(3.2, 0.8), 5, 90))
            grown = prompt + fresh(output / BLOCK + random.exponential(1 if kind == "agent" else 2))
            heapq.heappush(queue, (when + wait, which, kind, who, grown, turns - 1))
    return rows


def write_trace(rows: Sequence[TraceRow], path: Path) -> None:
    """As JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            entry = {
                "timestamp": row.timestamp,
                "input_length": row.input_length,
                "output_length": row.output_length,
                "hash_ids": list(row.hash_ids),
            }
            if row.tenant:
                entry["tenant"] = row.tenant
            if row.grammar:
                entry["grammar"] = True
            file.write(json.dumps(entry) + "\n")
