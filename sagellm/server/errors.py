"""Errors as the OpenAI API has them. Nothing of the inside goes out: the unexpected is logged and called internal."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from sagellm.errors import QueueFull, UserError

log = logging.getLogger(__name__)

RETRY_SECONDS = 1
MAX_SHOWN = 200
"""Characters of a refused value that are shown."""


class APIError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def kind_of(status: int) -> str:
    return KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")


def body_of(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind_of(status), "param": param, "code": code}}


def answer(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    retry_after: int = RETRY_SECONDS,
) -> JSONResponse:
    """`retry_after`: seconds, told where the client may come again."""
    headers = {"Retry-After": str(retry_after)} if status in (429, 503) else None
    return JSONResponse(body_of(status, message, param, code), status, headers)


def as_api_error(error: UserError) -> APIError:
    """What the engine refuses, as an answer."""
    if isinstance(error, QueueFull):
        return APIError(429, str(error), code="queue_full")
    return APIError(400, str(error))


def install(app: FastAPI) -> None:
    @app.exception_handler(APIError)
    async def _(request: Request, error: APIError) -> JSONResponse:
        return answer(error.status, error.message, error.param, error.code)

    @app.exception_handler(UserError)
    async def _(request: Request, error: UserError) -> JSONResponse:
        found = as_api_error(error)
        return answer(found.status, found.message, found.param, found.code)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = describe(error.errors())
        return answer(400, message, param)

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> JSONResponse:
        log.exception("%s %s failed", request.method, request.url.path)
        return answer(500, "internal error")


def describe(errors: Sequence[Any]) -> tuple[str, str | None]:
    """One line about the first thing that is wrong with a request's body, and the field's name."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"the body is no valid JSON: {first.get('ctx', {}).get('error', first['msg'])}", None
    place = [str(part) for part in first["loc"] if part != "body"]
    # the branches of a union are named by their types, which are no part of the field's place
    field = ".".join(part for part in place if part.isdecimal() or part.isidentifier())
    if first["type"] == "extra_forbidden":
        return f"unknown parameter {field!r}; accepted: those of /openapi.json", field
    message = first["msg"].removeprefix("Value error, ")
    if not field:
        return message, None
    return f"{field} is {_shown(first.get('input'))}: {message}", field


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
