"""Rotary position embedding: the frequencies of every kind of `RopeConfig`, and the tables of cos and sin.

The formulas and the order of operations are those of transformers (modeling_rope_utils.py), so that float32
results are equal to the last bit. Half-split layout: dimension i of a head turns with i + rotary_dim/2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sagellm.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, sequence_length: int | None = None) -> tuple[Tensor, float]:
    """Radians a position of each pair of dimensions, float32 [rotary_dim/2], and the factor on cos and sin.

    Only `dynamic` depends on the sequence's length in tokens; None means one within the original context.
    """
    return _KINDS[rope.kind](rope, sequence_length)


def cos_sin_table(rope: RopeConfig, max_positions: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[max_positions, rotary_dim]: row p is cos (first half) and sin (second half) of position p.

    For `dynamic` the rows hold for sequences within the original context; see `dynamic_cos_sin`.
    """
    frequencies, factor = inverse_frequencies(rope)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
    return _cos_sin(angles, factor).to(dtype)


def dynamic_cos_sin(rope: RopeConfig, positions: Tensor, lengths: Tensor) -> Tensor:
    """float32 [T, rotary_dim]: row positions[t] of the table for a sequence of lengths[t] tokens.

    positions and lengths are integers [T]. In float32 throughout, as in transformers' forward pass.
    """
    lengths = lengths.clamp(min=rope.original_max_positions)
    exponents = _exponents(rope).to(positions.device)
    frequencies = 1.0 / _dynamic_theta(rope, lengths)[:, None] ** exponents
    return _cos_sin(positions[:, None].float() * frequencies, 1.0)


def _cos_sin(angles: Tensor, factor: float) -> Tensor:
    return torch.cat((angles.cos() * factor, angles.sin() * factor), dim=-1)


def _exponents(rope: RopeConfig) -> Tensor:
    return torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim


def _default(rope: RopeConfig, sequence_length: int | None) -> tuple[Tensor, float]:
    return 1.0 / rope.theta ** _exponents(rope), 1.0


def _linear(rope: RopeConfig, sequence_length: int | None) -> tuple[Tensor, float]:
    """Position interpolation (Chen et al. 2023)."""
    frequencies, factor = _default(rope, sequence_length)
    return frequencies / rope.factor, factor


def _dynamic(rope: RopeConfig, sequence_length: int | None) -> tuple[Tensor, float]:
    """Dynamic NTK scaling: theta grows with the sequence once it is longer than the original context."""
    length = max(sequence_length or 0, rope.original_max_positions)
    return 1.0 / _dynamic_theta(rope, length) ** _exponents(rope), 1.0


def _dynamic_theta(rope: RopeConfig, length):
    """theta for a length from the original context up: a float for an int, float32 [T] for integers [T]."""
    stretch = rope.factor * length / rope.original_max_positions - (rope.factor - 1)
    return rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))


def _llama3(rope: RopeConfig, sequence_length: int | None) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated."""
    frequencies, factor = _default(rope, sequence_length)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    is_long = wavelengths > rope.original_max_positions / low
    is_short = wavelengths < rope.original_max_positions / high
    keep = (rope.original_max_positions / wavelengths - low) / (high - low)
    between = (1 - keep) * frequencies / rope.factor + keep * frequencies
    stretched = torch.where(is_long, frequencies / rope.factor, frequencies)
    return torch.where(is_long | is_short, stretched, between), factor


def _yarn(rope: RopeConfig, sequence_length: int | None) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp over the dimensions, from kept to stretched."""
    periods = rope.theta ** _exponents(rope)
    low = _yarn_dimension(rope, rope.beta_fast)
    high = _yarn_dimension(rope, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001  # as published: a step instead of a division by zero
    ramp = (torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / (high - low)
    keep = 1 - ramp.clamp(0, 1)
    frequencies = 1.0 / (rope.factor * periods) * (1 - keep) + 1.0 / periods * keep
    return frequencies, _yarn_attention_factor(rope)


def _yarn_dimension(rope: RopeConfig, rotations: float) -> float:
    """The dimension that turns this many times over the original context (YaRN, section 3.2)."""
    turns = math.log(rope.original_max_positions / (rotations * 2 * math.pi))
    return rope.rotary_dim * turns / (2 * math.log(rope.theta))


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_scale(rope.factor, rope.mscale) / _yarn_scale(rope.factor, rope.mscale_all_dim)
    return _yarn_scale(rope.factor, 1)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


_KINDS: dict[str, Callable[[RopeConfig, int | None], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
