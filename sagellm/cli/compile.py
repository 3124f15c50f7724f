"""`sagellm compile`: what becomes of a batch of prompts, stage by stage. Needs no weights and runs nothing."""

from __future__ import annotations

from pathlib import Path

import click

from sagellm.batch import Request, SamplingParams
from sagellm.cli import timeline
from sagellm.cli.options import MODEL, MODEL_NAMES, engine_config, options, read_lines, read_requests, take
from sagellm.engine.explain import Explanation, explain
from sagellm.engine.planner import Planner
from sagellm.engine.record import inputs_path, save_inputs
from sagellm.engine.tokenizer import Tokenizer
from sagellm.errors import UserError, unknown
from sagellm.ir.dialects import weights
from sagellm.ir.dot import dot
from sagellm.ir.graph import IRGraph
from sagellm.ir.timeline import predict
from sagellm.passes.driver import Remark

EMITS = ("ir", "code", "plan", "weights", "dot", "timeline")
PHASE_LINE = "// -----// {} //----- //"


@click.command("compile")
@options(*MODEL)
@click.option("--prompts", "prompts_file", help="File with one prompt a line; - is standard input.")
@click.option("--requests", "requests_file", help="JSON list of {prompt, max_tokens, temperature, ...}.")
@click.option(
    "--dump-ir", is_flag=False, flag_value="final", help="final, or after-all: the graph after every pass."
)
@click.option("--emit", default=None, help=f"What to print: {', '.join(EMITS)}.  [default: ir]")
@click.option(
    "--tables", is_flag=True, help="Write each request's values into the graph, one line a request."
)
@click.option("--remarks", is_flag=True, help="Print what each pass did, and what it declined and why.")
@click.option("--require-pass", multiple=True, help="Fail with status 1 when this pass did nothing.")
@click.option("--verify", is_flag=True, help="Evaluate the graph before and after each pass and compare.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Write one numbered file per phase here; with --emit timeline, the trace as JSON.",
)
def compile_(**given) -> None:
    """Show what a batch of prompts compiles to: graphs, plan, code, weights program.

    The batch is the first step; prompts beyond --max-batched-tokens are not in it.
    """
    settings = take(given, MODEL_NAMES)
    if bool(given["prompts_file"]) == bool(given["requests_file"]):
        raise UserError("compile wants one batch; accepted: --prompts FILE or --requests JSON")
    emit = given["emit"] or "ir"
    if emit not in EMITS:
        raise unknown("--emit", emit, EMITS)
    dump = given["dump_ir"] or "final"
    if dump not in ("final", "after-all"):
        raise unknown("--dump-ir", dump, ("final", "after-all"))
    if given["prompts_file"]:
        requests = [(line, SamplingParams()) for line in read_lines(given["prompts_file"])]
    else:
        requests = read_requests(given["requests_file"])
    planner = Planner(engine_config(settings, max_sequences=len(requests)))
    for name in given["require_pass"]:
        if name not in [p.name for p in planner.pipeline.passes]:
            raise unknown("pass in --require-pass", name, [p.name for p in planner.pipeline.passes])
    for number, (prompt, how) in enumerate(requests):
        planner.submit(Request(f"request-{number}", _ids(planner, prompt), how))
    batch = planner.schedule()
    told = explain(planner, batch)
    if emit == "timeline":
        machine = timeline.machine_of(planner, batch.forwarded, len(batch.output_rows()))
        click.echo(timeline.as_text(told, machine), nl=False)
        if given["output"]:
            timeline.write_trace(given["output"], predict(told.final, machine))
            click.echo(f"wrote {given['output']}, for chrome://tracing or ui.perfetto.dev")
    elif given["output"]:
        write(given["output"], told, given["tables"])
        final = given["output"] / f"{len(told.phases):02}-final.mlir"
        save_inputs(inputs_path(final), planner, batch)
        click.echo(f"wrote {len(told.phases) + 5} files to {given['output']}")
    else:
        click.echo(_show(told, emit, dump, given["tables"]), nl=False)
    if given["verify"]:
        _verify(planner, batch)
    if given["remarks"]:
        click.echo("\n".join(f"// {remark}" for remark in told.remarks))
    for name in given["require_pass"]:
        _require(name, told.remarks)


def _ids(planner: Planner, prompt: str | list[int]) -> list[int]:
    return Tokenizer.load(planner.folder).encode(prompt) if isinstance(prompt, str) else prompt


def _show(told: Explanation, emit: str, dump: str, tables: bool) -> str:
    match emit:
        case "code":
            return told.program.source
        case "plan":
            return str(told.plan)
        case "weights":
            return weights_program(told.final).text()
        case "dot":
            return dot(told.final)
    if dump == "final":
        return told.final.text(tables=tables)
    parts = [f"{PHASE_LINE.format(name)}\n{graph.text(tables=tables)}" for name, graph in named_phases(told)]
    return "// -----\n".join(parts)


def named_phases(told: Explanation) -> list[tuple[str, IRGraph]]:
    names = {"lowered": "the batch, as lowered", "model": "the model, before its passes"}
    return [(names.get(phase.name, f"after {phase.name}"), phase.graph) for phase in told.phases]


def weights_program(graph: IRGraph) -> IRGraph:
    some = IRGraph()
    for op in graph:
        if isinstance(op, weights.Load):
            some.add(op.clone())
    return some


def write(folder: Path, told: Explanation, tables: bool) -> None:
    """One file a phase, then the final module, the plan, the code and the remarks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {str(folder)!r}: {error}") from error
    for number, phase in enumerate(told.phases):
        (folder / f"{number:02}-{phase.name}.mlir").write_text(
            phase.graph.text(tables=tables), encoding="utf-8"
        )
    last = len(told.phases)
    (folder / f"{last:02}-final.mlir").write_text(told.final.text(tables=tables), encoding="utf-8")
    (folder / f"{last + 1:02}-plan.txt").write_text(str(told.plan), encoding="utf-8")
    (folder / f"{last + 2:02}-code.py").write_text(told.program.source, encoding="utf-8")
    (folder / f"{last + 3:02}-remarks.txt").write_text(
        "".join(f"{remark}\n" for remark in told.remarks), encoding="utf-8"
    )


def _require(name: str, remarks: list[Remark]) -> None:
    said = [remark for remark in remarks if remark.pass_name == name]
    if any(remark.done for remark in said):
        return
    why = "; ".join(dict.fromkeys(remark.message for remark in said)) or "nothing in this batch matches it"
    click.echo(f"sagellm compile: error: required pass {name} did nothing: {why}", err=True)
    raise SystemExit(1)


def _verify(planner: Planner, batch) -> None:
    from sagellm.meaning.check import check_batch

    click.echo(check_batch(planner, batch))
