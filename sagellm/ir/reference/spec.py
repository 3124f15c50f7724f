"""The meaning of speculation: what a node's guesses lead to is what as many plain steps would do with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
from attrs import evolve, frozen
from torch import Tensor

from sagellm.batch import Columns
from sagellm.ir.dialects import spec
from sagellm.ir.reference.values import Group, How, StepScope


@frozen
class Accepted:
    """What counts of a sequence's tree: its tokens, and the last node that was right."""

    row: int
    tokens: tuple[int, ...]
    cell: int


def branch(scope: StepScope, op: spec.Branch, members: Group) -> Group:
    return [evolve(member, paths=_paths(scope.batch.columns, member.row)) for member in members]


def _paths(c: Columns, row: int) -> tuple[tuple[int, ...], ...]:
    """The guesses that lead to each cell, from the last known token, which is cell 0 and has none."""
    paths: list[tuple[int, ...]] = [()]
    for guess in range(int(c.drafted[row])):
        paths.append((*paths[int(c.draft_parents[row, guess])], int(c.draft_tokens[row, guess])))
    return tuple(paths)


def how_of_nodes(c: Columns, members: Group) -> How:
    """The sampling columns as they would be, had the sequences got their guesses: one row for each node."""
    nodes = [(member.row, path) for member in members for path in member.paths]
    rows = [row for row, _ in nodes]
    columns = SimpleNamespace(**{
        name: value[rows].copy()
        for name, value in vars(c).items()
        if isinstance(value, np.ndarray) and len(value) == c.capacity
    })  # fmt: skip
    for node, (row, path) in enumerate(nodes):
        known = int(c.length[row])
        columns.tokens[node, known : known + len(path)] = path
        columns.length[node] = known + len(path)
    return How(tuple(range(len(nodes))), cast(Columns, columns))


def verify(scope: StepScope, op: spec.Verify, tokens: Tensor, members: Group) -> list[Accepted]:
    chosen, result = iter(tokens.tolist()), []
    for member in members:
        by_path = {path: (cell, next(chosen)) for cell, path in enumerate(member.paths)}
        ends = scope.batch.columns.stops[member.row].tolist()
        path: tuple[int, ...] = ()
        cell, token = by_path[path]
        while token not in ends and (*path, token) in by_path:
            path = (*path, token)
            cell, token = by_path[path]
        result.append(Accepted(member.row, (*path, token), cell))
    return result


def commit(scope: StepScope, op: spec.Commit, path: list[Accepted], members: Group) -> None:
    for accepted in path:
        scope.cache[accepted.row] = scope.walked[accepted.row, accepted.cell]


MEANINGS = {spec.Branch: branch, spec.Verify: verify, spec.Commit: commit}
