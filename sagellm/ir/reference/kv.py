"""The meaning of the `kv` operations.

Block ids are unobservable: a set of blocks is the sequences that have room, and where a block lies changes nothing.
"""

from __future__ import annotations

from sagellm.ir.dialects import kv
from sagellm.ir.reference.values import Group, StepScope


def allocate(scope: StepScope, op: kv.Allocate, *groups: Group) -> frozenset[int]:
    return frozenset(member.row for group in groups for member in group)


def move(scope: StepScope, op: kv.Evict | kv.Offload | kv.Fetch | kv.Copy) -> tuple:
    return ()


MEANINGS = {kv.Allocate: allocate, kv.Evict: move, kv.Offload: move, kv.Fetch: move, kv.Copy: move}
