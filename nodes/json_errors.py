"""What the pack's routes share: a JSON object from the page, held to a size, and errors in a form that it can show."""

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

MOST_BYTES = 1 << 14


def refusal(status: int, problem: str, remedy: str) -> web.Response:
    """{"error": {"problem", "remedy"}}."""
    return web.json_response({"error": {"problem": problem, "remedy": remedy}}, status=status)


def json_errors(failure: str) -> Callable[[Handler], Handler]:
    """A handler whose `I2VError`s are answered with 400; `failure` says in 500 what an unforeseen error prevents."""

    def decorate(handler: Handler) -> Handler:
        @wraps(handler)
        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)
            except I2VError as error:
                return refusal(400, error.problem, error.remedy)
            # What third-party classes make of odd values is without bounds; the page must have an answer all the same.
            except Exception as error:
                logger.exception("%s", failure)
                return refusal(500, f"{failure} ({error!r})", "see ComfyUI's log")

        return answer

    return decorate


async def json_object(request: web.Request, remedy: str) -> dict[str, Any]:
    """The request's body. Raises `BadInputError` for what is no JSON object, or longer than `MOST_BYTES`."""
    try:
        values: object = json.loads(await _body(request, remedy))
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"the request is no JSON ({error})", "send a JSON object") from error
    if not isinstance(values, dict):
        raise BadInputError("the request is no JSON object", remedy)
    return values


async def _body(request: web.Request, remedy: str) -> bytes:
    content = b""
    async for part in request.content.iter_chunked(MOST_BYTES):
        content += part
        if len(content) > MOST_BYTES:
            raise BadInputError(f"the request is longer than {MOST_BYTES:,} bytes", remedy)
    return content
