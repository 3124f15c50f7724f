"""`sagellm opt`: graphs as text in, passes over them, text out. What xdsl-opt is to xDSL's dialects."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click
from attrs import frozen

from sagellm import backends, cli
from sagellm.cli.passes import known_passes
from sagellm.errors import UserError, unknown
from sagellm.ir.graph import IRGraph
from sagellm.passes import driver

if TYPE_CHECKING:
    from sagellm.target import CapabilityDescriptor

SEPARATOR = "// -----\n"


@click.command()
@click.argument("file", default="-")
@click.option(
    "-p", "--pipeline", default="", metavar="PASS,PASS{OPTION=VALUE},...", help="Passes to run, in order."
)
@click.option(
    "--target", default="cpu", show_default=True, help="Backend that the passes and --emit code ask."
)
@click.option(
    "--emit", type=click.Choice(["ir", "code"]), default="ir", show_default=True, help="What to print."
)
@click.option(
    "--split-input-file", is_flag=True, help="The file holds several modules, parted by '// -----'."
)
@click.option("--print-between-passes", is_flag=True, help="Print the module before every pass too.")
@click.option("--generic", is_flag=True, help="Print MLIR's generic syntax.")
@click.option("--tables", is_flag=True, help="Print the values of tables.")
@click.option(
    "--verify",
    type=click.Choice(["off", "weak", "full"]),
    default="full",
    show_default=True,
    help="Checks after reading and after every pass.",
)
@click.option(
    "--remarks", is_flag=True, help="Print, as comments, what the passes did and what they declined."
)
@click.option(
    "--verify-diagnostics", is_flag=True, help="Print a module's error to stdout in its place; go on."
)
@click.option("-o", "--output", metavar="FILE", help="Write there instead of stdout.")
@click.option(
    "--load-pass",
    "extra",
    multiple=True,
    metavar="MODULE:CLASS",
    help="Know this pass too (or FILE.py:CLASS).",
)
@click.option("--without", multiple=True, metavar="KERNEL", help="As if the target had no such kernel.")
@click.option(
    "--layout",
    multiple=True,
    metavar="DTYPE=NAME",
    help="As if the target's linear wanted this weight layout.",
)
def opt(
    file: str,
    pipeline: str,
    target: str,
    split_input_file: bool,
    verify_diagnostics: bool,
    output: str | None,
    extra: tuple[str, ...],
    without: tuple[str, ...],
    layout: tuple[str, ...],
    **printing,
) -> None:
    """Read modules of our dialects from FILE (or stdin), run passes over them, print them.

    Every pass of the pipeline sees every module: one module may hold a step and a model.
    """
    if backends.parts(target)[0] not in backends.names():
        raise unknown("target", target, backends.names())
    passes = driver.parse(pipeline, lambda: known_passes(extra)).passes
    capability = _capability(target, without, layout) if passes else None
    job = _Job(passes=passes, target=target, capability=capability, **printing)
    name = "<stdin>" if file == "-" else file
    text = _read(file)
    written: list[str] = []
    write: Callable[[str], object] = written.append if output else lambda part: click.echo(part, nl=False)
    for number, (line, part) in enumerate(_parts(text, split_input_file)):
        if number:
            write(SEPARATOR)
        try:
            job.run(part, name, line, write)
        except UserError as error:
            if not verify_diagnostics:
                raise
            write(f"{error}\n")
    if output:
        _write(output, "".join(written))


def run_opt(args: Sequence[str], stdin: str = "") -> cli.Outcome:
    """`sagellm opt ARGS` in this process: (exit code, stdout, stderr)."""
    return cli.capture(["opt", *args], stdin)


@frozen(kw_only=True)
class _Job:
    """What happens to each module of the input."""

    passes: tuple[driver.Pass, ...]
    target: str
    capability: CapabilityDescriptor | None
    emit: str
    verify: str
    generic: bool
    tables: bool
    remarks: bool
    print_between_passes: bool

    def run(self, text: str, name: str, line: int, write: Callable[[str], object]) -> None:
        graph = IRGraph.parse("\n" * line + text, name)
        try:
            graph.verify(self.verify)
            remarks = self._run_passes(graph, write)
        except UserError as error:
            raise UserError(f"{name}{f' (module from line {line + 1})' if line else ''}: {error}") from error
        comment = "//" if self.emit == "ir" else "#"
        if self.remarks:
            write("".join(f"{comment} {remark}\n" for remark in remarks))
        write(self._text(graph) if self.emit == "ir" else self._code(graph, name))

    def _run_passes(self, graph: IRGraph, write: Callable[[str], object]) -> list[driver.Remark]:
        if self.capability is None:
            return []
        context = driver.PassContext(self.capability)
        for pass_ in self.passes:
            if self.print_between_passes:
                write(f"// IR before {pass_}\n{self._text(graph)}")
            driver.Pipeline([pass_]).run(graph, pass_.graph, context, self.verify)
        return context.remarks

    def _text(self, graph: IRGraph) -> str:
        return graph.text(tables=self.tables, generic=self.generic)

    def _code(self, graph: IRGraph, name: str) -> str:
        return backends.load(self.target).emit(graph, Path(name).stem).source


def _capability(target: str, without: Sequence[str], layout: Sequence[str]) -> CapabilityDescriptor:
    """What the target can do, changed as `--without` and `--layout` say."""
    capability = backends.load(target).capability
    for kernel in without:
        if kernel not in capability.kernels:
            raise unknown(f"kernel of {target}", kernel, sorted(capability.kernels))
    layouts = dict(capability.linear_layouts)
    for item in layout:
        dtype, equals, layout_name = item.partition("=")
        if not equals:
            raise UserError(f"--layout is {item!r}; accepted: DTYPE=NAME, or DTYPE= for none")
        capability.check_dtype(dtype)
        layouts[dtype] = layout_name
    return attrs.evolve(
        capability,
        kernels=capability.kernels - frozenset(without),
        linear_layouts={dtype: layout_name for dtype, layout_name in layouts.items() if layout_name},
    )


def _parts(text: str, split: bool) -> Iterator[tuple[int, str]]:
    """(lines before it, text) of each module."""
    at = 0
    for part in re.split(r"^// -----[ \t]*\n", text, flags=re.MULTILINE) if split else [text]:
        yield at, part
        at += part.count("\n") + 1


def _read(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path!r}: {getattr(error, 'strerror', error)}") from error


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path!r}: {error.strerror}") from error
