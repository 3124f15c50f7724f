"""What tests of the control plane share."""

import asyncio
import socket
from contextlib import asynccontextmanager

import uvicorn


@asynccontextmanager
async def served(app):
    """An application at an address of this machine; its port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        settings = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(settings)
        task = asyncio.create_task(server.serve([found]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield found.getsockname()[1]
        finally:
            server.should_exit = True
            await task


def run(work, seconds=120):
    return asyncio.run(asyncio.wait_for(work, seconds))
