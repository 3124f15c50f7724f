"""The meaning of the collectives, over the tensors of all ranks of the group."""

from __future__ import annotations

import torch
from torch import Tensor

from sagellm.ir.dialects import comm
from sagellm.ir.reference.values import ModelScope


def _sum(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.float() for tensor in tensors]).sum(dim=0).to(tensors[0].dtype)


def all_reduce(scope: ModelScope, op: comm.AllReduce, x: Tensor) -> Tensor:
    _, tensors = scope.exchange(op.group.data, x)
    return _sum(tensors)


def all_gather(scope: ModelScope, op: comm.AllGather, x: Tensor) -> Tensor:
    _, tensors = scope.exchange(op.group.data, x)
    return torch.cat(tensors, dim=op.dim.value.data)


def reduce_scatter(scope: ModelScope, op: comm.ReduceScatter, x: Tensor) -> Tensor:
    rank, tensors = scope.exchange(op.group.data, x)
    return _sum(tensors).chunk(len(tensors), dim=op.dim.value.data)[rank]


MEANINGS = {comm.AllReduce: all_reduce, comm.AllGather: all_gather, comm.ReduceScatter: reduce_scatter}
