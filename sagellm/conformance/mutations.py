"""Are errors in emitted code caught? Random ones are put into a program's text, and the layers of proof are asked.

A mutant is caught when a call does not bind (`bind`), breaks a rule (`constraints`), calls something else than the plan
promised (`trace`), raises otherwise (`error`), or gives other numbers (`numbers`).
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch
from attrs import define, frozen
from torch.utils._python_dispatch import TorchDispatchMode

from sagellm import backends
from sagellm.backends.plan import Program
from sagellm.conformance import scenario, stand_in
from sagellm.rows import Rows

KINDS = (("decode", "prefill", "shared"), ("decode", "cascade"), ("decode",))
"""Of the programs that are mutated."""
TOLERANCE = 1e-5
"""As a part of the largest value."""


@frozen
class Mutant:
    """One error in a program."""

    kinds: tuple[str, ...]
    what: str
    source: str


@define
class Step:
    """A step of the scenario, as its program got it."""

    program: Program
    weights: object
    cache: list[tuple[torch.Tensor, torch.Tensor]]
    rows: Rows
    block_size: int


class Trace(TorchDispatchMode):
    """The operators that run, in order."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


def collect(target: str, folder: Path) -> dict[tuple[str, ...], Step]:
    """A step of each kind, from the scenario in float32."""
    found: dict[tuple[str, ...], Step] = {}

    def watch(core, words, function):
        def forward(weights, cache, rows):
            if words in KINDS and words not in found and len(core.executor._rows.tokens) > 2:
                copies = [(keys.clone(), values.clone()) for keys, values in cache]
                program = core.compiler.model(words).program
                found[words] = Step(program, weights, copies, core.executor._rows, core.columns.block_size)
            return function(weights, cache, rows)

        return forward

    own = backends.load(target).capability.dtypes[0]
    scenario.run(target, folder, own, watch=watch)
    return found


def run(step: Step, source: str, target: str) -> tuple[torch.Tensor, list, list[str]]:
    """Logits, the cache and the trace of a program's text over a step."""
    cache = [(keys.clone(), values.clone()) for keys, values in step.cache]
    rows = backends.load(target).upload(step.rows, step.block_size)
    with torch.inference_mode(), Trace() as trace:
        logits = Program("mutant", source, {})["model"](step.weights, cache, rows)
    return logits, cache, trace.names


def caught(step: Step, mutant: Mutant, target: str, expected: tuple) -> str | None:
    """By which layer; None where all pass."""
    try:
        logits, cache, names = run(step, mutant.source, target)
    except stand_in.ContractBroken as error:
        return error.layer
    except RuntimeError as error:
        return "bind" if "schema" in str(error).lower() else "error"
    except Exception:
        return "error"
    if names != expected[2]:
        return "trace"
    pairs = [(logits, expected[0]), *((a, b) for x, y in zip(cache, expected[1]) for a, b in zip(x, y))]
    for ours, theirs in pairs:
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return "shape"
        if not (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max():
            return "numbers"
    return None


def mutants(steps: dict[tuple[str, ...], Step], count: int, seed: int = 0) -> Iterator[Mutant]:
    """So many different ones, each in the functions of a model that are called in a step."""
    random, seen = Random(seed), set()
    kinds = sorted(steps)
    while len(seen) < count:
        words = random.choice(kinds)
        tree = ast.parse(steps[words].program.source)
        functions = [
            f
            for f in tree.body
            if isinstance(f, ast.FunctionDef) and not f.name.startswith(("load", "sample"))
        ]
        change = random.choice(CHANGES)
        function = random.choice([f for f in functions if f.name != "model"])
        before = ast.unparse(tree)
        what = change(function, random)
        source = ast.unparse(tree)
        if what is None or source == before or (words, source) in seen:
            continue
        seen.add((words, source))
        yield Mutant(words, f"{function.name}: {what}", source)


# one error in a function, in place; what it was, or None where there is no place for it


def _calls(function: ast.FunctionDef) -> list[ast.Call]:
    return [node for node in ast.walk(function) if isinstance(node, ast.Call)]


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def drop_argument(function: ast.FunctionDef, random: Random) -> str | None:
    call = random.choice(_calls(function))
    arguments = [*call.args, *call.keywords]
    if not arguments:
        return None
    gone = random.choice(arguments)
    (call.args if gone in call.args else call.keywords).remove(gone)
    return f"{_name(call)} without {ast.unparse(gone)}"


def rename_argument(function: ast.FunctionDef, random: Random) -> str | None:
    named = [(call, k) for call in _calls(function) for k in call.keywords if k.arg]
    if not named:
        return None
    call, keyword = random.choice(named)
    before, keyword.arg = keyword.arg, f"{keyword.arg}_"
    return f"{_name(call)} with {before} called {keyword.arg}"


def swap_arguments(function: ast.FunctionDef, random: Random) -> str | None:
    some = [call for call in _calls(function) if len(call.args) > 1]
    if not some:
        return None
    call = random.choice(some)
    i = random.randrange(len(call.args) - 1)
    call.args[i], call.args[i + 1] = call.args[i + 1], call.args[i]
    return f"{_name(call)} with {ast.unparse(call.args[i])} before {ast.unparse(call.args[i + 1])}"


def swap_keywords(function: ast.FunctionDef, random: Random) -> str | None:
    some = [call for call in _calls(function) if len(call.keywords) > 1]
    if not some:
        return None
    call = random.choice(some)
    i = random.randrange(len(call.keywords) - 1)
    first, second = call.keywords[i : i + 2]
    first.value, second.value = second.value, first.value
    return f"{_name(call)} with {first.arg} and {second.arg} exchanged"


def change_value(function: ast.FunctionDef, random: Random) -> str | None:
    constants = [
        (call, node)
        for call in _calls(function)
        for argument in (*call.args, *(k.value for k in call.keywords))
        for node in ast.walk(argument)
        if isinstance(node, ast.Constant) and node.value is not None
    ]
    if not constants:
        return None
    call, node = random.choice(constants)
    before = node.value
    if isinstance(before, bool):
        node.value = not before
    elif isinstance(before, int):
        node.value = before + random.choice((-1, 1))
    elif isinstance(before, float):
        node.value = before * 2
    else:
        node.value = f"{before}_"
    return f"{_name(call)}: {before!r} is {node.value!r}"


def change_dtype(function: ast.FunctionDef, random: Random) -> str | None:
    types = [
        n for n in ast.walk(function) if isinstance(n, ast.Attribute) and n.attr in ("float32", "bfloat16")
    ]
    if not types:
        return None
    node = random.choice(types)
    before, node.attr = node.attr, "float16"
    return f"{before} is float16"


def _statements(function: ast.FunctionDef) -> list[int]:
    return [i for i, line in enumerate(function.body) if not isinstance(line, ast.Return)]


def drop_call(function: ast.FunctionDef, random: Random) -> str | None:
    gone = function.body.pop(random.choice(_statements(function)))
    return f"no {ast.unparse(gone).splitlines()[0]}"


def duplicate_call(function: ast.FunctionDef, random: Random) -> str | None:
    i = random.choice(_statements(function))
    function.body.insert(i, copy.deepcopy(function.body[i]))
    return f"twice {ast.unparse(function.body[i]).splitlines()[0]}"


def reorder(function: ast.FunctionDef, random: Random) -> str | None:
    """Two lines of which the second reads what the first makes, or writes where it reads."""
    places = [i for i in _statements(function)[:-1] if _depends(function.body[i + 1], function.body[i])]
    if not places:
        return None
    i = random.choice(places)
    function.body[i], function.body[i + 1] = function.body[i + 1], function.body[i]
    return f"before its time {ast.unparse(function.body[i]).splitlines()[0]}"


def _depends(later: ast.stmt, earlier: ast.stmt) -> bool:
    made = {n.id for n in ast.walk(earlier) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    read = {n.id for n in ast.walk(later) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    writes = isinstance(earlier, ast.Expr) and "kv" in {
        n.id for n in ast.walk(earlier) if isinstance(n, ast.Name)
    }
    return bool(made - {"_"} & read) or (writes and "kv" in read)


CHANGES: tuple[Callable[[ast.FunctionDef, Random], str | None], ...] = (
    drop_argument, rename_argument, swap_arguments, swap_keywords, change_value, change_dtype,
    drop_call, duplicate_call, reorder,
)  # fmt: skip


def judge(target: str, folder: Path, count: int, seed: int = 0) -> Iterator[tuple[Mutant, str | None]]:
    """Each mutant, and the layer that caught it. Stand-ins are installed."""
    steps = collect(target, folder)
    expected = {kinds: run(step, step.program.source, target) for kinds, step in steps.items()}
    for kinds, step in steps.items():
        unchanged = Mutant(kinds, "nothing", step.program.source)
        assert caught(step, unchanged, target, expected[kinds]) is None, kinds
    for mutant in mutants(steps, count, seed):
        yield mutant, caught(steps[mutant.kinds], mutant, target, expected[mutant.kinds])
