"""The meaning of the batch graph: logical sequences and a logical cache become the same plus new tokens."""

from __future__ import annotations

import torch
from attrs import evolve
from torch import Tensor

from sagellm.batch import Phase
from sagellm.errors import UserError
from sagellm.ir.attrs import last_dim
from sagellm.ir.dialects import batch
from sagellm.ir.reference.spec import Accepted, how_of_nodes
from sagellm.ir.reference.values import Forwarded, Group, How, LogicalRows, Member, StepScope


def group(scope: StepScope, op: batch.Group) -> Group:
    """The table's sequences. Its columns `leader` and `shared` are decisions; only `batch.share` acts on them."""
    table = op.table.data
    columns = table.columns if table.bound else scope.batch.table(Phase[op.phase.data.upper()])
    cells = [dict(zip(columns, map(int, cells))) for cells in zip(*columns.values())]
    return [
        Member(
            row=cell["row"],
            context=cell["context"],
            end=cell["context"] + cell["new"],
            length=cell["length"],
            leader=cell.get("leader", -1),
            shared=cell.get("shared", 0),
        )
        for cell in cells
    ]


def share(scope: StepScope, op: batch.Share, members: Group) -> Group:
    return [evolve(member, waits=member.shared > 0) for member in members]


def cascade(scope: StepScope, op: batch.Cascade, members: Group) -> Group:
    """How keys are read changes nothing of what attention means."""
    return members


def rows(scope: StepScope, op: batch.Rows, *arguments: Group | frozenset[int]) -> Group:
    """Every sequence of the groups; each must have been given blocks."""
    room = set().union(*(a for a in arguments if isinstance(a, frozenset)))
    members = [member for a in arguments if not isinstance(a, frozenset) for member in a]
    if homeless := [member.row for member in members if member.row not in room]:
        raise UserError(f"batch.rows: sequence {homeless[0]} has no blocks; accepted: those of kv.allocate")
    return members


def sampling(scope: StepScope, op: batch.Sampling, *groups: Group) -> How:
    if any(member.paths for group in groups for member in group):
        return how_of_nodes(scope.batch.columns, groups[0])
    getting = tuple(member.row for group in groups for member in group if member.gets_token)
    return How(getting, scope.batch.columns)


def forward(scope: StepScope, op: batch.Forward, members: Group) -> Tensor:
    """Logits [R, V] of the sequences that get a token, or of the nodes of their trees.

    Who waits for a leader takes over its part of the cache.
    """
    if any(member.paths for member in members):
        return _forward_trees(scope, op, members)
    order, by_row = _leaders_first(members), {member.row: member for member in members}
    wanted = {member.row: _computes_last(member, by_row) for member in members if member.gets_token}
    logits: dict[tuple[int, int], Tensor] = {}
    for member in order:
        if member.waits:
            _take_over(scope, member)
        positions = range(member.start, member.end)
        if positions:
            row = member.row
            tokens = tuple(scope.batch.columns.tokens[row, member.start : member.end].tolist())
            outputs = tuple(sorted({at for owner, at in wanted.values() if owner == row}))
            item = Forwarded(row, positions, tokens, member.length, outputs)
            computed = scope.forward(op.model.root_reference.data, LogicalRows((item,)))
            logits |= {(row, at): value for at, value in zip(outputs, computed, strict=True)}
    scope.logits = {row: logits[at] for row, at in wanted.items()}
    if not wanted:
        return torch.zeros(0, last_dim(op.result.type))
    return torch.stack(list(scope.logits.values()))


def _forward_trees(scope: StepScope, op: batch.Forward, members: Group) -> Tensor:
    """Logits [N, V] of every node. Each is reached by plain steps of one token, from the cache as it was."""
    name, logits = op.model.root_reference.data, []
    for member in members:
        row, before = member.row, dict(scope.cache.get(member.row, {}))
        last = int(scope.batch.columns.tokens[row, member.length - 1])
        for cell, path in enumerate(member.paths):
            scope.cache[row] = dict(before)
            steps = [
                Forwarded(row, range(at, at + 1), (token,), at + 1, (at,))
                for at, token in enumerate((last, *path), member.context)
            ]
            logits.append([scope.forward(name, LogicalRows((item,)))[0] for item in steps][-1])
            scope.walked[row, cell] = scope.cache[row]
        scope.cache[row] = scope.walked[row, 0]
        scope.logits[row] = logits[-len(member.paths)]
    return torch.stack(logits)


def _computes_last(member: Member, by_row: dict[int, Member]) -> tuple[int, int]:
    """(row, position) of the token that gives the member's logits: its own, or one of a leader up the chain."""
    position = member.end - 1
    while position < member.start:
        member = by_row[member.leader]
    return member.row, position


def _leaders_first(members: Group) -> list[Member]:
    order: list[Member] = []
    waiting = list(members)
    while waiting:
        done = {member.row for member in order}
        ready = [member for member in waiting if not member.waits or member.leader in done]
        if not ready:
            raise UserError(
                f"batch.share: sequence {waiting[0].row} waits for {waiting[0].leader}, which never comes"
            )
        order += ready
        waiting = [member for member in waiting if member not in ready]
    return order


def _take_over(scope: StepScope, member: Member) -> None:
    """Positions `context` to `start` of every layer come from the leader's cache."""
    mine = scope.cache.setdefault(member.row, {})
    for layer, (keys, values) in scope.cache[member.leader].items():
        if len(keys) < member.start:
            raise UserError(
                f"batch.share: sequence {member.row} takes {member.start} positions over from sequence "
                f"{member.leader}, which has {len(keys)}"
            )
        part = slice(member.context, member.start)
        own_keys, own_values = mine.get(layer, (keys[:0], values[:0]))
        mine[layer] = torch.cat((own_keys, keys[part])), torch.cat((own_values, values[part]))


def sample(scope: StepScope, op: batch.Sample, logits: Tensor, how: How) -> Tensor:
    return scope.sample(op.sampler.root_reference.data, logits, how)


def commit(scope: StepScope, op: batch.Commit, tokens: Tensor | list[Accepted], *groups: Group) -> None:
    if isinstance(tokens, list):
        scope.tokens = {path.row: path.tokens[0] for path in tokens}
        scope.more = {path.row: path.tokens[1:] for path in tokens if path.tokens[1:]}
        return
    getting = [member.row for group in groups for member in group if member.gets_token]
    scope.tokens = dict(zip(getting, tokens.tolist(), strict=True))


def report(scope: StepScope, op: batch.Report, vectors: Tensor, *groups: Group) -> None:
    rows = [member.row for group in groups for member in group]
    scope.logits = dict(zip(rows, vectors, strict=True))


MEANINGS = {
    batch.Group: group,
    batch.Share: share,
    batch.Cascade: cascade,
    batch.Rows: rows,
    batch.Sampling: sampling,
    batch.Forward: forward,
    batch.Sample: sample,
    batch.Commit: commit,
    batch.Report: report,
}
