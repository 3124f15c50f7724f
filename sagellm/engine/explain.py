"""One batch, stage by stage: every graph on the way, the plan, the code, and what the passes said."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen
from xdsl.ir import Block

from sagellm.backends.plan import ExecutionPlan, Program
from sagellm.backends.step import emit_step
from sagellm.batch import Batch
from sagellm.engine.planner import Planner
from sagellm.ir.dialects import batch as b
from sagellm.ir.edit import only_block
from sagellm.ir.graph import IRGraph
from sagellm.ir.lower import bucket, lower, step_graph
from sagellm.models.decoder import build_embedder, build_model, build_sampler
from sagellm.passes.driver import Phase, Remark


@frozen
class Explanation:
    """What became of a batch."""

    phases: list[Phase]
    """The batch graph as lowered and after each batch pass, then the same for the model graph."""
    final: IRGraph
    """One module: `@step`, the model graph, `@sample` and the weights program. It can be run again."""
    plan: ExecutionPlan
    program: Program
    remarks: list[Remark]
    batch_phases: int
    """How many of the phases are the batch graph's."""


def explain(planner: Planner, batch: Batch, verify: str = "full") -> Explanation:
    """Compile a batch whose passes have decided, keeping every stage. Nothing is executed."""
    said = [
        Remark(name, done, "this batch", note)
        for done, notes in ((True, batch.notes), (False, batch.declines))
        for name, note in notes.items()
    ]
    graph = step_graph(lower(batch, planner.model.vocab_size))
    return explain_graph(planner, graph, batch.forwarded, said, verify)


def explain_graph(
    planner: Planner, lowered: IRGraph, forwarded: int, said: Sequence[Remark] = (), verify: str = "full"
) -> Explanation:
    """The same of a step's graph as lowered, which stays as it is."""
    context = planner.compiler.context(bucket(forwarded))
    context.remarks.extend(said)
    pipeline, step = planner.pipeline, lowered.clone()
    phases = [Phase("lowered", lowered, 0.0)]
    pipeline.run(step, "batch", context, verify, phases)
    batch_phases, block = len(phases), only_block(step.step)
    forward = next(op for op in block.ops if isinstance(op, b.Forward))
    functions, kinds = _functions(planner, block, forward), forward.rows.type.data
    phases.append(Phase("model", functions.clone(), 0.0))
    pipeline.run(functions, "model", context, verify, phases)
    program = planner.backend.emit(functions, f"{planner.model.name} {'+'.join(kinds)}")
    return Explanation(
        phases, step.merged(functions), emit_step(block), program, context.remarks, batch_phases
    )


def _functions(planner: Planner, block: Block, forward: b.Forward) -> IRGraph:
    """What the step calls: model and sampler, or the model without its head."""
    kinds, name = forward.rows.type.data, forward.model.root_reference.data
    if name != "model":
        pooling = name.removeprefix("embed_")
        return build_embedder(planner.model, planner.dtype, kinds, pooling, planner.compiler.kv_dtype)
    stages = next(op.how.type.data for op in block.ops if isinstance(op, b.Sample))
    sampler = build_sampler(planner.model.vocab_size, stages)
    return build_model(planner.model, planner.dtype, kinds, planner.compiler.kv_dtype).merged(sampler)
