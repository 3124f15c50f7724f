"""What the reference evaluates over: logical rows and a logical cache, without blocks, slots or padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from attrs import define, field, frozen
from torch import Tensor
from xdsl.dialects.builtin import SymbolRefAttr
from xdsl.ir import Attribute, Operation

from sagellm.batch import Batch, Columns
from sagellm.errors import UserError
from sagellm.ir.attrs import dtype_name

Cache = dict[int, dict[int, tuple[Tensor, Tensor]]]
"""Sequence row -> layer -> keys and values, each [positions, kv_heads, head_dim]."""

Weights = dict[str, list[dict[str, Tensor]]]
"""Function -> per layer of its `weights.load` -> weights by name."""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int8": torch.int8,
}

Observe = Callable[[Operation, int | None, tuple], None]
"""Called after each operation with its layer and its results."""


@frozen
class Forwarded:
    """What one sequence forwards in a step."""

    row: int
    positions: range
    tokens: tuple[int, ...]
    """The token ids at these positions."""
    length: int
    """Known tokens of the sequence."""
    outputs: tuple[int, ...]
    """Positions whose logits are wanted; each is one of `positions`."""


@frozen
class LogicalRows:
    """The rows of a step, T tokens of R outputs, sequence after sequence."""

    sequences: tuple[Forwarded, ...]

    def parts(self) -> Iterator[tuple[Forwarded, slice]]:
        """Each sequence with its place on the token axis."""
        first = 0
        for sequence in self.sequences:
            yield sequence, slice(first, first + len(sequence.positions))
            first += len(sequence.positions)

    @property
    def tokens(self) -> Tensor:
        """int64 [T]"""
        return _integers(sequence.tokens for sequence in self.sequences)

    @property
    def positions(self) -> Tensor:
        """int64 [T]"""
        return _integers(sequence.positions for sequence in self.sequences)

    @property
    def lengths(self) -> Tensor:
        """int64 [T], the known length of each token's sequence."""
        return _integers([sequence.length] * len(sequence.positions) for sequence in self.sequences)

    @property
    def outputs(self) -> Tensor:
        """int64 [R], tokens on the flattened axis."""
        return _integers(
            [at.start + position - sequence.positions.start for position in sequence.outputs]
            for sequence, at in self.parts()
        )


def _integers(lists) -> Tensor:
    return torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64)


@frozen
class How:
    """The sampling columns of the output rows, [R] sequence rows."""

    rows: tuple[int, ...]
    columns: Columns

    def column(self, name: str) -> np.ndarray:
        """One value per output row."""
        return getattr(self.columns, name)[list(self.rows)]


@frozen
class Member:
    """A sequence of a group: it brings the positions `context` to `end` into the cache."""

    row: int
    context: int
    end: int
    length: int
    leader: int = -1
    shared: int = 0
    waits: bool = False
    """Its first `shared` new tokens come from its leader; before `batch.share` that is a mere decision."""
    paths: tuple[tuple[int, ...], ...] = ()
    """After `spec.branch`: the guesses that lead to each node of its tree."""

    @property
    def start(self) -> int:
        """The first position it forwards itself."""
        return self.context + self.shared if self.waits else self.context

    @property
    def gets_token(self) -> bool:
        return self.end == self.length


Group = list[Member]
"""A list, since a tuple of a meaning is several results."""


def dtype_of(type_: Attribute, exact: bool) -> torch.dtype:
    """The torch dtype of a tensor type; float32 for shorter ones where evaluation is `exact`."""
    dtype = DTYPES[dtype_name(type_)]
    return torch.float32 if exact and dtype.is_floating_point else dtype


Exchange = Callable[[str, Tensor], tuple[int, list[Tensor]]]


def alone(group: str, x: Tensor) -> tuple[int, list[Tensor]]:
    """The exchange of a group of one rank."""
    return 0, [x]


@define
class ModelScope:
    """What an operation of a model function sees besides its operands."""

    weights: dict[str, Tensor]
    """Of this function and layer."""
    layer: int | None
    cache: Cache
    call: Callable[[str, int | None, Sequence[Any]], tuple]
    """Call a function of the graph for a layer (None outside of layers)."""
    exact: bool = False
    exchange: Exchange = alone
    """This rank's number in a group, and the tensors that all its ranks bring to a collective."""
    sent: dict[tuple[str, int], list[Tensor]] = field(factory=dict)
    """(group, shift) -> what came to this rank by `comm.send` and was not received yet."""

    @property
    def kv_layer(self) -> int:
        if self.layer is None:
            raise UserError("the KV cache is kept per layer; accepted: a function called by nn.repeat")
        return self.layer

    def weight(self, name: SymbolRefAttr) -> Tensor:
        return self.weights[name.root_reference.data]


@define
class StepScope:
    """What an operation of the batch graph sees besides its operands, and what it leaves behind."""

    batch: Batch
    cache: Cache
    forward: Callable[[str, LogicalRows], Tensor]
    """Run a function of the model graph over rows: logits [R, V]. Appends to the cache."""
    sample: Callable[[str, Tensor, How], Tensor]
    logits: dict[int, Tensor] = field(factory=dict)
    tokens: dict[int, int] = field(factory=dict)
    more: dict[int, tuple[int, ...]] = field(factory=dict)
    walked: dict[tuple[int, int], dict[int, tuple[Tensor, Tensor]]] = field(factory=dict)
    """(sequence row, node of its tree) -> the sequence's cache with the guesses up to there."""


@define
class LoadScope:
    """What an operation of the weights program sees besides its operands, and what it stores."""

    read: Callable[[str], Tensor]
    """A tensor of the checkpoint by name."""
    layer: int
    last: bool
    """Is this the last layer of the program?"""
    exact: bool = False
    rank: int = 0
    ranks: int = 1
    stored: dict[str, Tensor] = field(factory=dict)


@frozen
class StepResult:
    """What a step gives: by sequence row, for those that get a token in it; and the cache after it."""

    logits: dict[int, Tensor]
    """float32 [V]"""
    tokens: dict[int, int]
    cache: Cache
    more: dict[int, tuple[int, ...]] = field(factory=dict)
    """Tokens behind these, of sequences that speculate."""
