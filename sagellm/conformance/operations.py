"""Operations that no model of the scenario has, over random values: quantised norms, a product that is summed over
ranks, and filters of logits. The text goes through `kernel-fusion`, so each is what the backend's table makes of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sagellm import backends
from sagellm.backends.references import GROUPS
from sagellm.ir.graph import IRGraph
from sagellm.ir.reference.ranks import on_ranks
from sagellm.passes import pipeline
from sagellm.passes.driver import PassContext

TEXT = """
builtin.module {
  nn.func @quantized(%x: tensor<?x64xTYPE>) -> (tensor<?x64xi8>, tensor<?xf32>) {
    %values, %scales = nn.quantize %x : tensor<?x64xi8>, tensor<?xf32>
    nn.return %values, %scales
  }
  nn.func @normed(%x: tensor<?x64xTYPE>, %y: tensor<?x64xTYPE>) -> (tensor<?x64xTYPE>, tensor<?x64xi8>, tensor<?xf32>) {
    %x_1 = nn.add %x, %y : tensor<?x64xTYPE>
    %h = nn.rms_norm %x_1, @norm {eps = 1.0e-05} : tensor<?x64xTYPE>
    %values, %scales = nn.quantize %h : tensor<?x64xi8>, tensor<?xf32>
    nn.return %x_1, %values, %scales
  }
  nn.func @summed(%x: tensor<?x64xTYPE>, %rows: !batch.rows<prefill>) -> tensor<?x48xTYPE> {
    %o = nn.linear %x, @o_proj : tensor<?x48xTYPE>
    %sum = comm.all_reduce %o {group = tp} : tensor<?x48xTYPE>
    nn.return %sum
  }
  nn.func @filtered(%logits: tensor<?x2000xf32>, %how: !batch.sampling<draw, top_k, top_p>) -> tensor<?x2000xf32> {
    %logits_1 = nn.top_k %logits, %how : tensor<?x2000xf32>
    %logits_2 = nn.top_p %logits_1, %how : tensor<?x2000xf32>
    nn.return %logits_2
  }
  weights.load @load.summed layers 0 to 1 {
    %o_proj = weights.tensor {dim = 1, parts = 2, source = "o_proj"} : tensor<48x64xTYPE>
    weights.store %o_proj, @o_proj
  }
}
"""
TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
KEPT = {"filtered": (1, 40, 1000, 7), "filtered_widely": (0, 40, 1500, 7)}
"""k of four rows: as the call of Ascend takes it, and as it does not."""

OnRank = Callable[[int, Any], Tensor]
"""(rank, its `comm`) -> what it computes."""
Ranks = Callable[[OnRank], list[Tensor]]


class Lockstep:
    """The collectives of ranks that are threads of this process, as far as they are wanted here."""

    def __init__(self, rank: int, exchange: Callable[[str, Tensor], tuple[int, list[Tensor]]]):
        self._exchange, self.group_name = exchange, f"lockstep {rank}"
        GROUPS[self.group_name] = self.all_reduce

    def all_reduce(self, x: Tensor) -> Tensor:
        _, tensors = self._exchange("tp", x)
        return torch.stack([tensor.float() for tensor in tensors]).sum(0).to(x.dtype)


class Alone:
    """A group of one rank, by its name: its sum is what the rank brings."""

    def __init__(self, group_name: str = ""):
        self.group_name = group_name

    def all_reduce(self, x: Tensor) -> Tensor:
        return x


def two_ranks(work: OnRank) -> list[Tensor]:
    return on_ranks(2, lambda rank, exchange: work(rank, Lockstep(rank, exchange)))


def compute(target: str, dtype: str, ranks: Ranks = two_ranks) -> dict[str, list[Tensor]]:
    """The results by function, on the CPU."""
    backend = backends.load(target)
    graph = IRGraph.parse(TEXT.replace("TYPE", TYPES[dtype]))
    pipeline("kernel-fusion").run(graph, "model", PassContext(backend.capability), "full")
    program, device = backend.emit(graph, "operations"), backend.capability.device
    random = torch.Generator().manual_seed(0)
    type_ = torch.float32 if getattr(backend, "widened", False) else getattr(torch, dtype)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(type_).to(device)

    x, y, norm = some(9, 64), some(9, 64), some(64)
    x[4] = y[4] = 0
    parts, matrices = [some(9, 64) for _ in range(2)], [some(48, 64) for _ in range(2)]

    def product(rank: int, comm: Any) -> Tensor:
        return program["summed"](SimpleNamespace(o_proj=matrices[rank]), comm, parts[rank], None)

    logits = (torch.randn(4, 2000, generator=random) * 4).to(device)
    p = torch.tensor([0.9, 0.5, 1.0, 0.99], dtype=torch.float64)
    results = {
        "quantized": program["quantized"](x),
        "normed": program["normed"](SimpleNamespace(norm=norm), x, y),
        "summed": ranks(product),
    }
    for name, k in KEPT.items():
        how = SimpleNamespace(
            top_k=torch.tensor(k, device=device), top_p=p.to(device), top_k_span=(min(k), max(k))
        )
        results[name] = [program["filtered"](logits, how)]
    return {name: [value.cpu() for value in values] for name, values in results.items()}


def apart(ours: dict[str, list[Tensor]], theirs: dict[str, list[Tensor]]) -> tuple[float, int]:
    """Largest distance of floats, as a part of the largest of their result, and of int8 values, in steps."""
    distance, steps = 0.0, 0
    for name, values in ours.items():
        for one, other in zip(values, theirs[name], strict=True):
            if one.dtype == torch.int8:
                steps = max(steps, int((one.int() - other.int()).abs().max()))
            elif not torch.equal(one.isfinite(), other.isfinite()):
                return float("inf"), steps
            else:
                one, other = one[one.isfinite()].float(), other[other.isfinite()].float()
                distance = max(distance, float((one - other).abs().max() / other.abs().max()))
    return distance, steps
