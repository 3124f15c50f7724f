"""A pytest plug-in that runs `*.mlir` files with RUN lines, in process. The lines are lit's:

    // RUN: sagellm opt %s -p kernel-fusion --remarks | filecheck %s --check-prefix FUSED
    // RUN: not sagellm opt %s -p no-such-pass 2>&1 | filecheck %s --check-prefix UNKNOWN

Commands: `sagellm` and `filecheck`. `%s` is the file, `%S` its folder, `%%` a percent sign; a line that ends in a
backslash goes on in the next RUN line. `not` wants the command to fail, `2>&1` sends its errors down the pipe too.
Files none of whose RUN lines has a `sagellm` command belong to somebody else and are left alone.
"""

from __future__ import annotations

import os
import re
import shlex
import traceback
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

_RUN = re.compile(r"^\s*(?://|#|;)?\s*RUN:\s*(.*?)\s*$")
_OURS = re.compile(r"(?:^|[|\s])sagellm\s")
_UNKNOWN_SYNTAX = {"&&", "||", ";", "&", "<", ">", ">>", "2>"}


class RunFailed(Exception):
    """A RUN line did not do what it should; the message tells what did happen."""


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.suffix != ".mlir":
        return None
    if not any(_OURS.search(line) for _, line in run_lines(file_path)):
        return None
    return MlirFile.from_parent(parent, path=file_path)


class MlirFile(pytest.File):
    """One file; each of its RUN lines is a test."""

    def collect(self) -> Iterator[RunLine]:
        for number, line in run_lines(self.path):
            yield RunLine.from_parent(self, name=f"RUN:{number}", number=number, line=line)


class RunLine(pytest.Item):
    def __init__(self, *, number: int, line: str, **kwargs):
        super().__init__(**kwargs)
        self.number, self.line = number, line

    def runtest(self) -> None:
        run(self.line, self.path)

    def repr_failure(self, excinfo, style=None):
        if not isinstance(excinfo.value, RunFailed):
            return super().repr_failure(excinfo, style)
        return f"{os.path.relpath(self.path)}:{self.number}: RUN: {self.line}\n{excinfo.value}"

    def reportinfo(self):
        return self.path, self.number - 1, f"RUN: {self.line}"


def run_lines(path: Path) -> list[tuple[int, str]]:
    """(line number, command) of each RUN line; continued lines are joined."""
    found: list[tuple[int, str]] = []
    continues = False
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = _RUN.match(text)
        if match is None:
            continue
        command = match[1]
        if continues:
            first, earlier = found.pop()
            number, command = first, f"{earlier} {command}"
        continues = command.endswith("\\")
        found.append((number, command.removesuffix("\\").rstrip()))
    return found


def run(line: str, path: Path) -> None:
    """Run one pipeline; raises `RunFailed` at the first command that fails."""
    piped = ""
    for words in _commands(line, path):
        merge = "2>&1" in words
        words = [word for word in words if word != "2>&1"]
        fails = words[:1] == ["not"]
        name, *arguments = words[fails:] or [""]
        if name == "sagellm":
            code, piped, shown = _sagellm(arguments, piped, merge)
        elif name == "filecheck":
            code, shown = _filecheck(arguments, piped)
        else:
            raise RunFailed(
                f"unknown command {name!r}; accepted: sagellm, filecheck, each after an optional 'not'"
            )
        if (code != 0) != fails:
            what = "succeeded, but should fail" if fails else f"failed with exit status {code}"
            raise RunFailed(f"`{shlex.join(words)}` {what}\n{shown}".rstrip())


def _commands(line: str, path: Path) -> Iterable[list[str]]:
    values = {"%s": str(path), "%S": str(path.parent), "%%": "%"}
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise RunFailed(f"cannot read the RUN line: {error}") from error
    if unknown := _UNKNOWN_SYNTAX.intersection(words):
        raise RunFailed(f"the RUN line has {sorted(unknown)[0]!r}; accepted of a shell: | and 2>&1")
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "|":
            commands.append([])
        else:
            commands[-1].append(re.sub("%[sS%]", lambda m: values[m[0]], word))
    return commands


def _sagellm(arguments: list[str], stdin: str, merge: bool) -> tuple[int, str, str]:
    from sagellm.cli import capture

    try:
        outcome = capture(arguments, stdin, merge=merge)
    except Exception as error:  # a bug, here or in a pass; `not` does not want this either
        raise RunFailed(f"`sagellm {shlex.join(arguments)}` crashed\n{traceback.format_exc()}") from error
    return outcome.code, outcome.stdout, outcome.stderr or outcome.stdout


def _filecheck(arguments: list[str], text: str) -> tuple[int, str]:
    try:
        from filecheck.finput import FInput
        from filecheck.matcher import Matcher
        from filecheck.options import parse_argv_options
        from filecheck.parser import Parser
    except ImportError as error:
        raise RunFailed("filecheck is not installed: pip install filecheck") from error
    said = StringIO()
    with redirect_stdout(StringIO()), redirect_stderr(said):
        try:
            options = parse_argv_options(["filecheck", *arguments])
            source = FInput("<output>", text) if options.input_file == "-" else FInput.from_opts(options)
            code = Matcher(options, source, Parser.from_opts(options)).run()
        except (RuntimeError, OSError, re.error) as error:
            raise RunFailed(f"filecheck {shlex.join(arguments)}: {error}") from error
    return code, f"{said.getvalue().rstrip()}\n--- what it read ---\n{text.rstrip()}\n---"
