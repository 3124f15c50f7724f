"""Programs that need a process of their own, forked from one that has imported torch and sageLLM for all of them."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

COMMAND = "from sagellm.cli import main; main()"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["sagellm.conformance.verify", "sagellm.engine.engine", "sagellm.cli"])


def python(
    code: str,
    *arguments: object,
    path: Sequence[object] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """What `python -W ignore -c code arguments` does with `path` before the others, and these variables besides."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "stdout"), Path(folder, "stderr")
        given = code, [*map(str, arguments)], [*map(str, path)], {**os.environ, **(env or {})}, cwd, said
        process = _context.Process(target=_run, args=given)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise AssertionError(f"it has not ended after {timeout:g} s: {said[1].read_text()[-2000:]}")
        return subprocess.CompletedProcess(code, process.exitcode, *(file.read_text() for file in said))


def sagellm(*arguments: object, **how) -> subprocess.CompletedProcess[str]:
    """What `sagellm arguments` does."""
    return python(COMMAND, *arguments, **how)


def _run(code, arguments, path, env, cwd, said) -> None:
    import warnings

    warnings.simplefilter("ignore")
    for file, descriptor in zip(said, (1, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd or Path())
    sys.path[:0] = path
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
