"""The meaning of the collectives, over the tensors of all ranks of the group."""

from __future__ import annotations

import torch
from torch import Tensor
from xdsl.dialects.builtin import IntegerAttr

from sagellm.ir.dialects import comm
from sagellm.ir.reference.values import ModelScope, dtype_of

Collective = comm.AllReduce | comm.AllGather | comm.ReduceScatter | comm.AllToAll | comm.Start


def _sum(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.float() for tensor in tensors]).sum(dim=0).to(tensors[0].dtype)


def _dim(op: Collective) -> int:
    dim = op.properties["dim"]
    assert isinstance(dim, IntegerAttr)
    return dim.value.data


def all_reduce(scope: ModelScope, op: Collective, x: Tensor) -> Tensor:
    _, tensors = scope.exchange(op.group.data, x)
    return _sum(tensors)


def linear_all_reduce(scope: ModelScope, op: comm.LinearAllReduce, x: Tensor) -> Tensor:
    product = (x.float() @ scope.weight(op.weight).float().T).to(x.dtype)
    _, tensors = scope.exchange(op.group.data, product)
    return _sum(tensors)


def all_gather(scope: ModelScope, op: Collective, x: Tensor) -> Tensor:
    _, tensors = scope.exchange(op.group.data, x)
    return torch.cat(tensors, dim=_dim(op))


def reduce_scatter(scope: ModelScope, op: Collective, x: Tensor) -> Tensor:
    rank, tensors = scope.exchange(op.group.data, x)
    return _sum(tensors).chunk(len(tensors), dim=_dim(op))[rank]


def all_to_all(scope: ModelScope, op: Collective, x: Tensor) -> Tensor:
    rank, tensors = scope.exchange(op.group.data, x)
    dim = _dim(op)
    return torch.cat([tensor.chunk(len(tensors), dim=dim)[rank] for tensor in tensors], dim=dim)


def send(scope: ModelScope, op: comm.Send, x: Tensor) -> tuple:
    rank, tensors = scope.exchange(op.group.data, x)
    shift = op.shift.value.data
    scope.sent.setdefault((op.group.data, shift), []).append(tensors[(rank - shift) % len(tensors)])
    return ()


def recv(scope: ModelScope, op: comm.Recv, like: object) -> Tensor:
    return scope.sent[op.group.data, op.shift.value.data].pop(0).to(dtype_of(op.result.type, scope.exact))


def start(scope: ModelScope, op: comm.Start, x: Tensor) -> Tensor:
    """What is pending is the result already: no rank can see the time between."""
    return MEANINGS[comm.COLLECTIVES[op.collective.data]](scope, op, x)


def wait(scope: ModelScope, op: comm.Wait, pending: Tensor) -> Tensor:
    return pending


MEANINGS = {
    comm.AllReduce: all_reduce,
    comm.LinearAllReduce: linear_all_reduce,
    comm.AllGather: all_gather,
    comm.ReduceScatter: reduce_scatter,
    comm.AllToAll: all_to_all,
    comm.Send: send,
    comm.Recv: recv,
    comm.Start: start,
    comm.Wait: wait,
}
