"""Real servers for tests: in a process of their own, or in a thread of this one, which is there in a second."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn

from sagellm.engine.engine import SageLLMEngine
from sagellm.server.app import make_app
from sagellm.server.config import ServerConfig
from sagellm.server.run import listen

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
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def within(model: object, config: ServerConfig, **settings) -> Iterator[str]:
    """A server of this model with these settings of its engine; its address once it is ready."""
    failures: list[str] = []
    app = make_app(config, lambda: SageLLMEngine(str(model), **settings), failures.append)
    with listen(config) as found:
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [found]}, daemon=True)
        thread.start()
        address = f"http://{config.host}:{found.getsockname()[1]}"
        try:
            while app.state.server.engine is None:
                assert not failures, failures
                time.sleep(0.02)
            assert httpx.get(f"{address}/health", timeout=30).status_code == 200
            yield address
        finally:
            running.should_exit = True
            thread.join(30)
