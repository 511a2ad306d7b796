"""`POST /i2v_budget/plan`: the plan for the values on a VRAM Budget node, without running it.

The body is a JSON object with the node's widgets by name, and those of I2V Loader in place of the model link; optional
ones may be missing. `"fixes": false` skips the search for settings that would fit. Bad input is answered with status
400 and {"error": {"problem", "remedy"}}.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web
from server import PromptServer

from ..i2v_core.errors import BadInputError
from ..i2v_core.planning.trace import interruptible
from .budget import VRAMBudget
from .json_errors import json_errors, json_object, refusal
from .live import LOADER_FILES, live_plan
from .loader import Loader
from .validation import check_values

PATH = "/i2v_budget/plan"
_REMEDY = "send the node's widgets by name"
_MODEL, _FIXES = "model", "fixes"
# Two, so that one node's search for settings that fit does not block another node's answer.
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="i2v-budget-plan")


class _RequestAbandonedError(Exception):
    """The page has sent a newer request and closed this connection."""


def register() -> None:
    """Add the route to the host's server before it starts."""
    PromptServer.instance.routes.post(PATH)(post_plan)


@json_errors("no plan could be made")
async def post_plan(request: web.Request) -> web.Response:
    def check_connected() -> None:
        if request.transport is None or request.transport.is_closing():
            raise _RequestAbandonedError

    def plan(values: Mapping[str, Any], with_fixes: bool) -> dict[str, Any]:
        check_connected()
        with interruptible(check_connected):
            return live_plan(values, with_fixes=with_fixes)

    values = _validated(await json_object(request, _REMEDY))
    with_fixes = values.pop(_FIXES)
    try:
        answer = await asyncio.get_running_loop().run_in_executor(_threads, plan, values, with_fixes)
    except _RequestAbandonedError:
        return refusal(400, "the connection was closed", "send the request again")
    return web.json_response(answer)


def _validated(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values by name, each allowed by its widget."""
    loader = [spec for spec in Loader.define_schema().inputs if spec.id in LOADER_FILES]
    widgets = [*(spec for spec in VRAMBudget.define_schema().inputs if spec.id != _MODEL), *loader]
    unknown = values.keys() - {spec.id for spec in widgets} - {_MODEL, _FIXES}
    if unknown:
        raise BadInputError(f"'{min(unknown)}' is not an input of VRAM Budget", _REMEDY)
    if not isinstance(values.get(_MODEL), str):
        raise BadInputError("the request has no model", "choose one in I2V Loader")
    if not isinstance(values.setdefault(_FIXES, True), bool):
        raise BadInputError("fixes is not true or false", "send true or false")
    check_values(widgets, values)
    return {name: value for name, value in values.items() if value is not None}
