"""A real server in a process of its own, for tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

READY = re.compile(r"ready: (\S+) on (\S+) at (http://[^/]+)/v1")


@contextmanager
def server(*arguments: str, **env: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`sagellm serve` with these arguments on a free port; its process, and its address once it is ready."""
    command = [sys.executable, "-m", "sagellm", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | env)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := READY.match(line):
                break
        else:
            raise AssertionError("".join(lines))
        yield process, found[3]
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
