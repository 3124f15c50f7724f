"""The meaning of the weights program. A packed matrix is the matrix: only the kernel that reads it sees the layout."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sagellm.errors import UserError
from sagellm.ir.attrs import last_dim
from sagellm.ir.dialects import weights
from sagellm.ir.reference.values import LoadScope, dtype_of


def source_name(op: weights.Tensor, layer: int, last: bool) -> str:
    """The checkpoint's name of the tensor for a layer."""
    name = op.last.data if last and op.last is not None else op.source.data
    return name.replace("{layer}", str(layer)).replace("{layer+1}", str(layer + 1))


def tensor(scope: LoadScope, op: weights.Tensor) -> Tensor:
    name = source_name(op, scope.layer, scope.last)
    value, shape = scope.read(name), op.source_shape
    if tuple(value.shape) != shape:
        raise UserError(f"tensor {name} has shape {list(value.shape)}; accepted: {list(shape)}")
    if op.cut is not None:
        dim, parts = op.cut
        value = value.chunk(parts, dim)[scope.rank * parts // scope.ranks]
    if op.once is not None and scope.rank != 0:
        value = torch.zeros_like(value)
    return value.to(dtype_of(op.result.type, scope.exact))


def concat(scope: LoadScope, op: weights.Concat, *parts: Tensor) -> Tensor:
    return torch.cat(parts)


def pack(scope: LoadScope, op: weights.Pack, x: Tensor) -> Tensor:
    return x


def store(scope: LoadScope, op: weights.Store, x: Tensor) -> None:
    scope.stored[op.weight.root_reference.data] = x


def rope_table(scope: LoadScope, op: weights.RopeTable) -> Tensor:
    """Position p turns pair i of dimensions by p times its frequency, in float32."""
    given = {name: attr.value.data for name, attr in op.parameters.data.items()}  # type: ignore[attr-defined]
    positions, dim = op.result.type.get_shape()[0], last_dim(op.result.type)
    plain = [given["theta"] ** (-2 * pair / dim) for pair in range(dim // 2)]
    frequencies, scale = _KINDS[op.kind.data](plain, dim, given)
    angles = torch.arange(positions).float()[:, None] * torch.tensor(frequencies, dtype=torch.float32)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1) * scale
    return table.to(dtype_of(op.result.type, scope.exact))


def _default(plain: list[float], dim: int, given: dict[str, Any]) -> tuple[list[float], float]:
    return plain, 1.0


def _linear(plain: list[float], dim: int, given: dict[str, Any]) -> tuple[list[float], float]:
    """Position interpolation (Chen et al. 2023): positions are squeezed."""
    return [frequency / given["factor"] for frequency in plain], 1.0


def _llama3(plain: list[float], dim: int, given: dict[str, Any]) -> tuple[list[float], float]:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated."""
    low, high, frequencies = given["low_freq_factor"], given["high_freq_factor"], []
    for frequency in plain:
        turns = given["original_max_positions"] * frequency / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        frequencies.append(keep * frequency + (1 - keep) * frequency / given["factor"])
    return frequencies, 1.0


def _yarn(plain: list[float], dim: int, given: dict[str, Any]) -> tuple[list[float], float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp over the dimensions, from kept to stretched."""

    def pair_that_turns(times: float) -> float:
        """Which pair of dimensions turns this often over the original context."""
        context = given["original_max_positions"]
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(given["theta"]))

    low, high = pair_that_turns(given["beta_fast"]), pair_that_turns(given["beta_slow"])
    if given["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as published: a step instead of a division by zero
    frequencies = []
    for pair, frequency in enumerate(plain):
        stretched = min(max((pair - low) / (high - low), 0.0), 1.0)
        frequencies.append(stretched * frequency / given["factor"] + (1 - stretched) * frequency)
    return frequencies, _yarn_scale(given)


def _yarn_scale(given: dict[str, Any]) -> float:
    """The factor on cos and sin: given, or a quotient of two `mscale`s, or that of the paper."""

    def of(mscale: float) -> float:
        return 1.0 if given["factor"] <= 1 else 0.1 * mscale * math.log(given["factor"]) + 1.0

    if "attention_factor" in given:
        return given["attention_factor"]
    if given.get("mscale") and given.get("mscale_all_dim"):
        return of(given["mscale"]) / of(given["mscale_all_dim"])
    return of(1.0)


_KINDS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}

MEANINGS = {
    weights.Tensor: tensor,
    weights.Concat: concat,
    weights.RopeTable: rope_table,
    weights.Pack: pack,
    weights.Store: store,
}
