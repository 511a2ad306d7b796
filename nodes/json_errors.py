"""Shared by the pack's routes: JSON requests of limited size, and errors as JSON that the page can show."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from aiohttp import web

from ..i2v_core.errors import BadInputError, I2VError

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_BODY_BYTES = 1 << 14


def refusal(status: int, problem: str, remedy: str) -> web.Response:
    """Return the response `{"error": {"problem", "remedy"}}`."""
    return web.json_response({"error": {"problem": problem, "remedy": remedy}}, status=status)


def json_errors(failure: str) -> Callable[[Handler], Handler]:
    """Decorate a handler: an `I2VError` becomes a 400 response, any other error a 500 response that says `failure`."""

    def decorate(handler: Handler) -> Handler:
        @wraps(handler)
        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)
            except I2VError as error:
                return refusal(400, error.problem, error.remedy)
            # Third-party classes may raise anything on odd values; the page needs an answer in any case.
            except Exception as error:
                logger.exception("%s", failure)
                return refusal(500, f"{failure} ({error!r})", "see ComfyUI's log")

        return answer

    return decorate


async def json_object(request: web.Request, remedy: str) -> dict[str, Any]:
    """Parse the request's body; raise `BadInputError` if it is not a JSON object, or longer than `MAX_BODY_BYTES`."""
    try:
        values: object = json.loads(await _body(request, remedy))
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"the request is not valid JSON ({error})", "send a JSON object") from error
    if not isinstance(values, dict):
        raise BadInputError("the request is not a JSON object", remedy)
    return values


async def _body(request: web.Request, remedy: str) -> bytes:
    content = b""
    async for chunk in request.content.iter_chunked(MAX_BODY_BYTES):
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise BadInputError(f"the request is longer than {MAX_BODY_BYTES:,} bytes", remedy)
    return content
