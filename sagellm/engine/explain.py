"""One batch, stage by stage: every graph on the way, the plan, the code, and what the passes said."""

from __future__ import annotations

from attrs import frozen

from sagellm.backends.plan import ExecutionPlan, Program
from sagellm.backends.step import emit_step
from sagellm.batch import Batch
from sagellm.engine.planner import Planner
from sagellm.ir.dialects import batch as b
from sagellm.ir.edit import only_block
from sagellm.ir.graph import IRGraph
from sagellm.ir.lower import bucket, lower, step_graph
from sagellm.models.decoder import build_model, build_sampler
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


def explain(planner: Planner, batch: Batch, verify: str = "full") -> Explanation:
    """Compile a batch whose passes have decided, keeping every stage. Nothing is executed."""
    context = planner.compiler.context(bucket(batch.forwarded))
    for done, notes in ((True, batch.notes), (False, batch.declines)):
        context.remarks.extend(Remark(name, done, "this batch", note) for name, note in notes.items())
    pipeline = planner.pipeline
    step = step_graph(lower(batch, planner.model.vocab_size))
    phases = [Phase("lowered", step.clone(), 0.0)]
    pipeline.run(step, "batch", context, verify, phases)
    block = only_block(step.step)
    kinds = next(op.rows.type.data for op in block.ops if isinstance(op, b.Forward))
    stages = next(op.how.type.data for op in block.ops if isinstance(op, b.Sample))
    functions = build_model(planner.model, planner.dtype, kinds).merged(
        build_sampler(planner.model.vocab_size, stages)
    )
    phases.append(Phase("model", functions.clone(), 0.0))
    pipeline.run(functions, "model", context, verify, phases)
    program = planner.backend.emit(functions, f"{planner.model.name} {'+'.join(kinds)}")
    return Explanation(phases, step.merged(functions), emit_step(block), program, context.remarks)
