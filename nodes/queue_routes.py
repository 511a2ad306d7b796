"""Routes that show and steer the queue of I2V Batch.

- `GET /i2v_budget/queue`: whether it is paused, the number of jobs in each state, and the jobs themselves; at most 100
  of each state, or `?most=`.
- `GET /i2v_budget/queue/{job}/thumbnail`: a small picture of a job.
- `GET /i2v_budget/queue/metrics`: the number of jobs in each state, and the metrics of the batch, for Prometheus.
- `POST /i2v_budget/queue`: {"action": …}, answered with the queue as it is then. Actions: `pause` and `resume` the
  queue, or with {"job": id} a job; `cancel` and `retry` a job; `prioritize` a job, with {"priority": number}; `pin`,
  with {"jobs": [id, …]}, those that run first, in this order.

Bad input is answered with status 400 and {"error": {"problem", "remedy"}}. The node creates the queue's file, a request
never does.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from PIL import Image
from server import PromptServer

from ..i2v_core.batch.jobs.store import JobStore
from ..i2v_core.errors import BadInputError
from . import host
from .json_errors import json_errors, json_object
from .queue_view import PATH, empty_queue, metrics, picture_of, shown_queue

T = TypeVar("T")

_DEFAULT_LIMIT, _MAX_LIMIT = 100, 10_000
_MAX_ID = 2**63 - 1  # of SQLite
_THUMBNAIL_PIXELS = 192
_REMEDY = "send {'action': …} and what it needs"
# One thread, since the store has one connection; not the event loop's, since it waits for the disk.
_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="i2v-budget-queue")


def register() -> None:
    """Add the routes to the host's server, before that starts."""
    routes = PromptServer.instance.routes
    routes.get(PATH)(show)
    routes.get(PATH + "/metrics")(watch)
    routes.get(PATH + "/{job}/thumbnail")(thumbnail)
    routes.post(PATH)(steer)


@json_errors("the queue could not be read")
async def show(request: web.Request) -> web.Response:
    limit = _limit(request.query.get("most", str(_DEFAULT_LIMIT)))
    return web.json_response(await _with_store(lambda store: shown_queue(store, limit) if store else empty_queue()))


@json_errors("the figures could not be read")
async def watch(_: web.Request) -> web.Response:
    text = await _with_store(metrics)
    return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


@json_errors("the picture could not be read")
async def thumbnail(request: web.Request) -> web.Response:
    job_id = _id(_whole_number(request.match_info["job"]))
    content = await _with_store(lambda store: _thumbnail(_required(store), job_id))
    return web.Response(body=content, content_type="image/webp", headers={"Cache-Control": "private, max-age=86400"})


@json_errors("the queue could not be steered")
async def steer(request: web.Request) -> web.Response:
    action, values = _parsed_action(await json_object(request, _REMEDY))

    def act(store: JobStore | None) -> dict[str, Any]:
        queue = _required(store)
        action(queue, **values)
        return shown_queue(queue, _DEFAULT_LIMIT)

    return web.json_response(await _with_store(act))


async def _with_store(use: Callable[[JobStore | None], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_thread, lambda: use(_cached_store()))


def _required(store: JobStore | None) -> JobStore:
    if store is None:
        raise BadInputError("there is no queue yet", "add jobs with I2V Batch")
    return store


class _CachedStore:
    """The queue's file, kept open between requests; for `_thread` alone."""

    def __init__(self) -> None:
        self._store: JobStore | None = None
        self._file: tuple[Path, int] | None = None

    def __call__(self) -> JobStore | None:
        """The store; None without a file. It is opened again when the file has been replaced."""
        path = host.queue_file()
        file = (path, path.stat().st_ino) if path.is_file() else None
        if file != self._file:
            if self._store is not None:
                self._store.close()
            self._store, self._file = (JobStore(path), file) if file else (None, None)
        return self._store


_cached_store = _CachedStore()


def _thumbnail(store: JobStore, job_id: int) -> bytes:
    picture = picture_of(store.job(job_id))
    try:
        return _small(picture, picture.stat().st_mtime_ns)
    # Pillow raises OSError, SyntaxError or ValueError for damaged files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInputError(f"job {job_id} has no picture ({error})", "choose another job") from error


@lru_cache(maxsize=256)
def _small(picture: Path, changed_ns: int) -> bytes:  # noqa: ARG001
    """Encode a WebP of a few kilobytes. A file that is not a picture raises, so that its content stays private."""
    with Image.open(picture) as opened:
        opened.draft("RGB", (_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
        small = opened.convert("RGB")
    small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    content = io.BytesIO()
    small.save(content, format="WEBP", quality=80)
    return content.getvalue()


def _set_paused(paused: bool, job_action: Callable[[JobStore, int], None]) -> Callable[..., None]:
    def act(store: JobStore, job: int | None = None) -> None:
        if job is None:
            store.set_paused(paused)
        else:
            job_action(store, job)

    return act


@dataclass(frozen=True, slots=True, kw_only=True)
class _Action:
    """An action of the page."""

    act: Callable[..., None]
    required: tuple[str, ...] = ()
    """Names of values that it must be given."""
    optional: tuple[str, ...] = ()


_ACTIONS: Mapping[str, _Action] = {
    "pause": _Action(act=_set_paused(True, JobStore.pause), optional=("job",)),
    "resume": _Action(act=_set_paused(False, JobStore.resume), optional=("job",)),
    "cancel": _Action(act=lambda store, job: store.cancel(job), required=("job",)),
    "retry": _Action(act=lambda store, job: store.retry(job), required=("job",)),
    "prioritize": _Action(
        act=lambda store, job, priority: store.set_priority(job, priority), required=("job", "priority")
    ),
    "pin": _Action(act=lambda store, jobs: store.pin(jobs), required=("jobs",)),
}


def _parsed_action(values: dict[str, Any]) -> tuple[Callable[..., None], dict[str, Any]]:
    """The action and its arguments, each checked."""
    name = values.pop("action", None)
    action = _ACTIONS.get(name) if isinstance(name, str) else None
    if action is None:
        raise BadInputError(f"{_shortened(name)} is not an action", f"use one of {', '.join(_ACTIONS)}")
    missing = [it for it in action.required if it not in values]
    unknown = values.keys() - {*action.required, *action.optional}
    if missing or unknown:
        problem = f"{name} has no {missing[0]}" if missing else f"{name} takes no {_shortened(min(unknown))}"
        takes = ", ".join((*action.required, *action.optional))
        raise BadInputError(problem, f"give {takes}")
    return action.act, {it: _PARSERS[it](value) for it, value in values.items()}


def _id(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MAX_ID:
        raise BadInputError(f"{_shortened(value)} is not the id of a job", "use the id of a job in the list")
    return value


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or len(set(map(str, value))) < len(value):
        raise BadInputError(f"{_shortened(value)} is not a list of different jobs", "send each job's id once")
    return [_id(it) for it in value]


def _priority(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise BadInputError(f"the priority {_shortened(value)} is not a number", "use 1 for a usual one")
    return float(min(value, _MAX_ID))


def _limit(text: str) -> int:
    limit = _whole_number(text)
    if limit is None or not 0 < limit <= _MAX_LIMIT:
        raise BadInputError(f"most is {_shortened(text)}", f"use 1 to {_MAX_LIMIT:,}")
    return limit


def _whole_number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= len(str(_MAX_ID)) else None


def _shortened(value: Any) -> str:
    return repr(value)[:80]


_PARSERS: Mapping[str, Callable[[Any], Any]] = {"job": _id, "jobs": _ids, "priority": _priority}
