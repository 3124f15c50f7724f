"""What guessing tokens gains: the same requests with the pass `speculative-branching` and without, side by side."""

from __future__ import annotations

import gc
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sagellm import passes
from sagellm.batch import Request, SamplingParams
from sagellm.bench.workload import FIRST_TOKEN
from sagellm.config import EngineConfig
from sagellm.engine.core import EngineCore
from sagellm.errors import UserError

PASS = "speculative-branching"
PACKAGE = Path(__file__).parent.parent
DOCUMENT, GIVEN = 300, 8
"""Tokens of a document that is to be quoted, and of its beginning that is given."""
NAMES = (
    "total",
    "count",
    "value",
    "items",
    "name",
    "price",
    "left",
    "right",
    "data",
    "node",
    "index",
    "size",
)
EDITED = (
    "def {c}({a}):\n    {b} = 0\n    for i in range({n}):\n        {b} = {b} + {a}[i]\n    return {b}\n",
    "class {c}:\n    def __init__(self, {a}, {b}):\n        self.{a} = {a}\n        self.{b} = {b}\n",
    "{a} = {n}\n{b} = {a} * 2\nif {a} > {b}:\n    print({a})\nelse:\n    print({b})\n",
)


def edits(count: int, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Prompts that ask for a piece of code with another name in it, after an example of such an edit."""
    draw, prompts = random.Random(0), []
    for _ in range(count):
        text = ""
        for _ in range(2):
            a, b, c, new = draw.sample(NAMES, 4)
            code = draw.choice(EDITED).format(a=a, b=b, c=c, n=draw.randint(1, 99))
            text += f"# before\n{code}# Rename {a} to {new}:\n"
            asked, text = text, text + re.sub(rf"\b{a}\b", new, code)
        prompts.append(encode(asked))
    return prompts


def quotes(count: int, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Prompts that hold a document, a source file of this package, and ask to quote it: its first tokens come again."""
    prompts = []
    for file in sorted(PACKAGE.rglob("*.py")):
        document = encode(file.read_text(encoding="utf-8"))[:DOCUMENT]
        if len(document) == DOCUMENT and len(prompts) < count:
            prompts.append([*document, *encode("\n# quote:\n"), *document[:GIVEN]])
    return prompts


def unlike(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random prompts."""
    return np.random.default_rng(0).integers(FIRST_TOKEN, vocabulary, (count, length)).tolist()


def compare(
    config: EngineConfig, waves: Sequence[Sequence[Sequence[int]]], how: SamplingParams, repeats: int
) -> dict[str, float]:
    """Seconds of both engines over waves of prompts, each wave at once; medians over `repeats`, after one more that
    compiles what is needed. `different` counts the outputs, of all repeats, that are not the same: in short dtypes the
    products of more rows round otherwise, as they do in a larger batch."""
    named = str(passes.pipeline(config.pipeline)).split(",")
    if not any(name.partition("{")[0] == PASS for name in named):
        raise UserError(f"pipeline {config.pipeline!r} lacks {PASS}; accepted: one that has it")
    without = ",".join(name for name in named if name.partition("{")[0] != PASS)
    seconds, stats, different = [], None, 0
    for _ in range(repeats + 1):
        cores = []
        gc.collect()  # cores hold themselves in cycles, and much memory
        cores = [EngineCore(config.changed(pipeline=without, draft_model=None)), EngineCore(config)]
        both = np.zeros(2)
        for number, wave in enumerate(waves):
            took, told = zip(*(_serve(core, wave, how, number) for core in cores))
            both += took
            different += sum(one != other for one, other in zip(*told))
        seconds.append(both)
        stats = cores[1].stats()
    plain, guessing = np.array(seconds[1:]).T
    return {
        "requests": sum(map(len, waves)),
        "plain_s": float(np.median(plain)),
        "guessing_s": float(np.median(guessing)),
        "ratio": float(np.median(plain / guessing)),
        "least": float((plain / guessing).min()),
        "steps": stats.steps,
        "verify_steps": stats.verify_steps,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "different": different,
    }


def _serve(core: EngineCore, prompts, how: SamplingParams, wave: int) -> tuple[float, list]:
    for i, prompt in enumerate(prompts):
        core.submit(Request(f"{wave} {i}", list(prompt), how))
    told, began = {}, time.perf_counter()
    while core.busy:
        for token in core.step():
            told.setdefault(token.request_id, []).append(token.token)
    return time.perf_counter() - began, sorted(told.items())
