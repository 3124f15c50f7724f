"""Why a step or a lookup was as it was: routes for those who run the server, where it was told to have them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query
from starlette.responses import PlainTextResponse

from sagellm.errors import UserError
from sagellm.server.errors import APIError
from sagellm.server.state import ServerState

NOT_FOUND: dict[int | str, dict[str, Any]] = {
    404: {"description": "It is not kept, or there is no such pass."},
    503: {"description": "The model is being loaded, or the server shuts down."},
}
Number = Annotated[int, Path(ge=0, lt=2**63)]


async def _asked(call: Callable, *arguments: Any) -> Any:
    try:
        return await asyncio.to_thread(call, *arguments)
    except UserError as error:
        raise APIError(404, str(error), code="not_kept") from error


def routes(app: FastAPI, state: ServerState) -> None:
    @app.get("/debug/steps", responses=NOT_FOUND)
    async def steps(last: Annotated[int, Query(ge=1, le=1000)] = 20) -> dict[str, Any]:
        """The last steps, the latest first: size, whether the plan was found, times, what the passes said."""
        return {"steps": (await _asked(state.ready().steps))[:last]}

    @app.get("/debug/steps/{number}", responses=NOT_FOUND)
    async def step(number: Number) -> dict[str, Any]:
        """One step, and what each pass made of its graphs."""
        return await _asked(state.ready().step, number)

    @app.get("/debug/steps/{number}/ir", response_class=PlainTextResponse, responses=NOT_FOUND)
    async def ir(number: Number, after: Annotated[str, Query(max_length=100)] = "") -> PlainTextResponse:
        """Its graph as text behind a pass (or `lowered`, or `model`)."""
        return PlainTextResponse(await _asked(state.ready().step_ir, number, after))

    @app.get("/debug/requests/{request_id}/cache", responses=NOT_FOUND)
    async def cache(request_id: Annotated[str, Path(max_length=128)]) -> dict[str, Any]:
        """Block by block: was it in the KV cache when the request began, and why not."""
        return {"request": request_id, "blocks": await _asked(state.ready().cache_lookup, request_id)}
