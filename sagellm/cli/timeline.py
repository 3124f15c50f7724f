"""`sagellm compile --emit timeline`: what a step's model is predicted to take, as text and as a Chrome trace."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from sagellm.engine.explain import Explanation
from sagellm.engine.planner import Planner
from sagellm.errors import UserError
from sagellm.ir.graph import IRGraph
from sagellm.ir.timeline import COMPUTE, NETWORK, Machine, Part, Span, predict, total

WIDTH = 72
MARKS = {COMPUTE: "#", NETWORK: "="}
OVERLAP = "comm-compute-overlap"


def machine_of(planner: Planner, tokens: int, outputs: int) -> Machine:
    context = planner.compiler.context()
    return Machine.of(context.costs, context.topology, context.ranks, tokens, outputs)


def as_text(told: Explanation, machine: Machine) -> str:
    """A head, then each function with its lanes and its operations; times in microseconds."""
    parts = predict(told.final, machine)
    ranks = "one rank" if machine.ranks == 1 else f"each of {machine.ranks} ranks"
    lines = [
        f"Predicted, not measured: the model on {ranks}, {machine.tokens} tokens, {machine.outputs} with logits.",
        "Attention counts these tokens alone, not what was cached before.",
        f"device   {machine.costs.source}",
        *([f"network  {machine.topology}"] if machine.ranks > 1 else []),
    ]
    for part in parts:
        lines += ["", *_function(part)]
    whole = total(parts)
    hidden = sum(part.count * (part.busy(NETWORK) - part.exposed) for part in parts)
    lines += ["", f"{'total':<30}{whole * 1e6:12.1f} us"]
    if machine.ranks > 1:
        network = sum(part.count * part.busy(NETWORK) for part in parts)
        lines.append(f"{'network':<30}{network * 1e6:12.1f} us, of which {hidden * 1e6:.1f} are hidden")
    if (before := _before_overlap(told)) is not None:
        other = total(predict(before, machine))
        lines.append(f"{'without ' + OVERLAP:<30}{other * 1e6:12.1f} us ({whole / other - 1:+.1%} with it)")
    return "\n".join(lines) + "\n"


def _before_overlap(told: Explanation) -> IRGraph | None:
    """The model graph that the overlap pass was given, if it ran."""
    names = [phase.name for phase in told.phases]
    return told.phases[names.index(OVERLAP) - 1].graph if OVERLAP in names else None


def _function(part: Part) -> Iterator[str]:
    times = f"{part.count} times " if part.count > 1 else ""
    yield f"@{part.name}: {times}{part.seconds * 1e6:.1f} us"
    lanes = [lane for lane in (COMPUTE, NETWORK) if part.busy(lane)]
    for lane in lanes:
        yield f"  {lane:<8}|{_bar(part, lane)}| {part.busy(lane) * 1e6:.1f} us"
    yield f"  {'from':>10}{'to':>12}  {'lane':<8}  operation"
    for span in sorted(part.spans, key=lambda span: (span.start, span.end)):
        yield f"  {span.start * 1e6:10.1f}{span.end * 1e6:12.1f}  {span.lane:<8}  {span.name}"


def _bar(part: Part, lane: str) -> str:
    """One character for each part of the function's time: marked where the lane works for half of it or more."""
    cell = part.seconds / WIDTH
    work = [0.0] * WIDTH
    for span in part.spans:
        if span.lane == lane:
            for at in range(int(span.start / cell), min(WIDTH, int(span.end / cell) + 1)):
                work[at] += max(0.0, min(span.end, (at + 1) * cell) - max(span.start, at * cell))
    return "".join(MARKS[lane] if seconds >= cell / 2 else "." for seconds in work)


def write_trace(path: Path, parts: Iterable[Part]) -> None:
    """The whole step, layer after layer, for chrome://tracing or ui.perfetto.dev.

    Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU, complete events.
    """
    threads = {COMPUTE: 0, NETWORK: 1}
    events: list[dict] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": lane}}
        for lane, tid in threads.items()
    ]
    at = 0.0
    for part in parts:
        for call in range(part.count):
            events += [_event(span, at, threads[span.lane], part, call) for span in part.spans]
            at += part.seconds
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror}") from error


def _event(span: Span, at: float, thread: int, part: Part, call: int) -> dict:
    return {
        "ph": "X",
        "name": span.name,
        "ts": round((at + span.start) * 1e6, 3),
        "dur": round((span.end - span.start) * 1e6, 3),
        "pid": 0,
        "tid": thread,
        "args": {"function": part.name, "call": call},
    }
