"""Speculation: guessed tokens are verified by one forward, and what holds of them is kept."""

from __future__ import annotations

from typing import ClassVar

from xdsl.dialects.builtin import TensorType
from xdsl.ir import Dialect
from xdsl.irdl import irdl_op_definition, operand_def, result_def

from sagellm.ir.attrs import GroupType
from sagellm.ir.syntax import SageOp


@irdl_op_definition
class Branch(SageOp):
    """Decodes that bring guessed tokens along: a tree behind each sequence's last known token.

    The guesses and their parents are in columns, `drafted` of the table says how many. Each node is an output row.
    """

    name = "spec.branch"
    group = operand_def(GroupType)
    result = result_def(GroupType)
    READS: ClassVar = ("sequences",)
    HINTS: ClassVar = ("tree",)


@irdl_op_definition
class Verify(SageOp):
    """The tokens that count: the one chosen at a tree's root and, as long as it was guessed, at the guess.

    The token of a node is the one that a plain step would choose there, so as many plain steps give the same.
    """

    name = "spec.verify"
    tokens = operand_def(TensorType)
    tree = operand_def(GroupType)
    result = result_def(TensorType)
    READS: ClassVar = ("sequences",)
    HINTS: ClassVar = ("path",)


@irdl_op_definition
class Commit(SageOp):
    """Keys and values of the guesses that count go to their places behind the context; all others are given up."""

    name = "spec.commit"
    path = operand_def(TensorType)
    tree = operand_def(GroupType)
    READS: ClassVar = ("kv", "sequences")
    WRITES: ClassVar = ("kv", "pool")


SPEC = Dialect("spec", [Branch, Verify, Commit], [])
