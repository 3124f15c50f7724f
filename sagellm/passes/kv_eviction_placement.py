"""Which KV blocks are kept when nobody holds them, which leave when room is needed, and where their copies are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sagellm.batch import AHEAD, Batch
from sagellm.ir.dialects import batch as b
from sagellm.ir.dialects import kv
from sagellm.ir.edit import insert_after
from sagellm.ir.graph import IRGraph
from sagellm.kv.policies import policy
from sagellm.passes.driver import Pass, PassContext, StepView, rewrites


@dataclass(frozen=True)
class KVEvictionPlacement(Pass):
    """Keeps KV blocks that nobody holds for later sequences; a policy says which of them leave when room is needed.

    Without this pass a block is free as soon as nobody holds it: only sequences that run at the same time share one.
    decide: has blocks in host memory fetched for the sequence that waits first, as far as there is room; chooses the
    blocks that leave for this step, and whether they go to host memory or are dropped; then also as many again, those
    next to leave, to be copied ahead of their turn.
    apply: puts the copies made ahead, either way, behind `batch.forward`: the step does not touch their blocks, so they
    can run beside it, and the step that needs the room, or what was fetched, has nothing to wait for. Other copies
    stay before `kv.allocate`, which hands their blocks out again, and other fetches before the forward that reads them.
    Declines to offload where there is no host memory, or where a copy costs more than computing a block again.
    """

    policy: str = "lifetime"
    """lru, lfu, lfu-aging, slru, s3-fifo, t-lru, priority or lifetime."""
    offload: bool = True
    """Blocks that leave go to host memory, where it has room and a copy pays; else all are dropped."""

    name: ClassVar[str] = "kv-eviction-placement"
    graph: ClassVar[Literal["batch"]] = "batch"

    def __post_init__(self) -> None:
        policy(self.policy)

    def prepare(self, view: StepView) -> None:
        if view.kv is not None:
            view.kv.retain(self.policy, offload=self.offload)

    def decide(self, batch: Batch, view: StepView) -> None:
        batch.leaving = batch.ahead = batch.leaving[:0]
        cache = view.kv
        batch.coming = 0
        if cache is None:
            return
        batch.coming = cache.coming(batch)
        if batch.coming:
            batch.notes[self.name] = f"{batch.coming} blocks are fetched for the sequence that waits first"
        if not (short := cache.shortage(batch)):
            return
        batch.offload = self.offload and cache.copies_pay
        chosen = cache.first_to_leave(2 * short if batch.offload else short)
        batch.leaving, batch.ahead = chosen[:short], chosen[short:]
        where = "go to host memory" if batch.offload else "are dropped"
        note = f"{len(batch.leaving)} blocks leave and {where}"
        batch.notes[self.name] = f"{note}; {batch.notes[self.name]}" if batch.coming else note

    @rewrites(kv.Evict)
    def leave(self, op: kv.Evict, graph: IRGraph, context: PassContext) -> None:
        self.applied(context, op, "blocks were kept until room was needed")

    @rewrites(kv.Offload, kv.Fetch)
    def place(self, op: kv.Offload | kv.Fetch, graph: IRGraph, context: PassContext) -> None:
        if op.when is None or op.when.data != AHEAD:
            needed = "hands its blocks out again" if isinstance(op, kv.Offload) else "reads its blocks"
            self.declined(context, op, f"this step {needed}")
            return
        block = op.parent
        forward = next((o for o in block.ops if isinstance(o, b.Forward)), None) if block else None
        if forward is None:
            self.declined(context, op, "there is no forward to run beside")
            return
        op.detach()
        insert_after(forward, op)
        self.applied(context, op, "this step does not touch its blocks, so it runs beside the forward")
