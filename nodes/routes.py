"""`POST /i2v_budget/plan`: the plan for the values on a VRAM Budget node, without queueing.

The body is a JSON object of the node's widgets by name, with the name of a model in place of its link; optional ones
may be missing. `fixes`: false leaves out the search for what would fit instead. Bad input is answered with status 400
and {"error": {"problem", "remedy"}}.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web
from server import PromptServer

from ..i2v_core.errors import BadInputError, I2VError
from ..i2v_core.planning.trace import interruptible
from .budget import VRAMBudget
from .checked import check_values
from .live import live_plan

logger = logging.getLogger(__name__)

PATH = "/i2v_budget/plan"
_MOST_BYTES = 1 << 14
_MODEL, _FIXES = "model", "fixes"
# Two, so that a search for what would fit does not hold another node's answer up.
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="i2v-budget-plan")


class _NobodyWaitsError(Exception):
    """The page has asked anew, and has closed this connection."""


def register() -> None:
    """Add the route to the host's server, before that starts."""
    PromptServer.instance.routes.post(PATH)(answer)


async def answer(request: web.Request) -> web.Response:
    def check_awaited() -> None:
        if request.transport is None or request.transport.is_closing():
            raise _NobodyWaitsError

    def plan(values: Mapping[str, Any], with_fixes: bool) -> dict[str, Any]:
        check_awaited()
        with interruptible(check_awaited):
            return live_plan(values, with_fixes=with_fixes)

    try:
        values = _checked(await _body(request))
        with_fixes = values.pop(_FIXES)
        found = await asyncio.get_running_loop().run_in_executor(_threads, plan, values, with_fixes)
    except I2VError as error:
        return _error(400, error.problem, error.remedy)
    except _NobodyWaitsError:
        return _error(400, "the connection was closed", "ask again")
    # What a third-party class makes of a config with odd numbers; the page must have an answer all the same.
    except Exception as error:
        logger.exception("no plan could be made for the page")
        return _error(500, f"no plan could be made ({error!r})", "see ComfyUI's log")
    return web.json_response(found)


def _error(status: int, problem: str, remedy: str) -> web.Response:
    return web.json_response({"error": {"problem": problem, "remedy": remedy}}, status=status)


async def _body(request: web.Request) -> bytes:
    content = b""
    async for part in request.content.iter_chunked(_MOST_BYTES):
        content += part
        if len(content) > _MOST_BYTES:
            raise BadInputError(f"the request is longer than {_MOST_BYTES:,} bytes", "send the node's widgets alone")
    return content


def _checked(content: bytes) -> dict[str, Any]:
    """The values by name, each as its widget allows."""
    try:
        values: object = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"the request is no JSON ({error})", "send a JSON object") from error
    if not isinstance(values, dict):
        raise BadInputError("the request is no JSON object", "send the node's widgets by name")
    widgets = [spec for spec in VRAMBudget.define_schema().inputs if spec.id != _MODEL]
    strangers = values.keys() - {spec.id for spec in widgets} - {_MODEL, _FIXES}
    if strangers:
        raise BadInputError(f"'{min(strangers)}' is no input of VRAM Budget", "send the node's widgets by name")
    if not isinstance(values.get(_MODEL), str):
        raise BadInputError("the request names no model", "choose one in I2V Loader")
    if not isinstance(values.setdefault(_FIXES, True), bool):
        raise BadInputError("fixes is not true or false", "send true or false")
    check_values(widgets, values)
    return {name: value for name, value in values.items() if value is not None}
