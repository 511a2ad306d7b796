"""`POST /i2v_budget/plan`: the plan for the values on a VRAM Budget node, without queueing.

The body is a JSON object of the node's widgets by name, with those of I2V Loader in place of the link to a model;
optional ones may be missing. `fixes`: false leaves out the search for what would fit instead. Bad input gets
status 400 and {"error": {"problem", "remedy"}}.
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
# Two, so that a search for what would fit does not hold another node's answer up.
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="i2v-budget-plan")


class _NobodyWaitsError(Exception):
    """The page has asked anew, and has closed this connection."""


def register() -> None:
    """Add the route to the host's server, before that starts."""
    PromptServer.instance.routes.post(PATH)(answer)


@json_errors("no plan could be made")
async def answer(request: web.Request) -> web.Response:
    def check_awaited() -> None:
        if request.transport is None or request.transport.is_closing():
            raise _NobodyWaitsError

    def plan(values: Mapping[str, Any], with_fixes: bool) -> dict[str, Any]:
        check_awaited()
        with interruptible(check_awaited):
            return live_plan(values, with_fixes=with_fixes)

    values = _checked(await json_object(request, _REMEDY))
    with_fixes = values.pop(_FIXES)
    try:
        found = await asyncio.get_running_loop().run_in_executor(_threads, plan, values, with_fixes)
    except _NobodyWaitsError:
        return refusal(400, "the connection was closed", "ask again")
    return web.json_response(found)


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """The values by name, each as its widget allows."""
    loader = [spec for spec in Loader.define_schema().inputs if spec.id in LOADER_FILES]
    widgets = [*(spec for spec in VRAMBudget.define_schema().inputs if spec.id != _MODEL), *loader]
    strangers = values.keys() - {spec.id for spec in widgets} - {_MODEL, _FIXES}
    if strangers:
        raise BadInputError(f"'{min(strangers)}' is no input of VRAM Budget", _REMEDY)
    if not isinstance(values.get(_MODEL), str):
        raise BadInputError("the request names no model", "choose one in I2V Loader")
    if not isinstance(values.setdefault(_FIXES, True), bool):
        raise BadInputError("fixes is not true or false", "send true or false")
    check_values(widgets, values)
    return {name: value for name, value in values.items() if value is not None}
