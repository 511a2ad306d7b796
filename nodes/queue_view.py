"""JSON of the queue for the page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..i2v_core.batch.jobs.job import JobRecord, JobState
from ..i2v_core.batch.jobs.store import JobStore
from ..i2v_core.batch.monitoring.messages import score_message, waiting_texts
from ..i2v_core.batch.monitoring.report import seconds_of
from ..i2v_core.batch.scheduling.policy import Policy, ScoreBreakdown
from ..i2v_core.batch.scheduling.queue_view import view_queue
from . import host_files
from .batch_run import current_batch

JSON = dict[str, Any]

PATH = "/i2v_budget/queue"


def empty_queue() -> JSON:
    """Answer while there is no queue."""
    return {
        "paused": False,
        "rule": Policy.WEIGHT.value,
        "waits": [],
        "remarks": [],
        "counts": {state.value: 0 for state in JobState},
        "seconds_left": None,
        "jobs": [],
    }


def shown_queue(store: JobStore, limit: int) -> JSON:
    """Answer with at most `limit` jobs of each state.

    `rule` is the policy of the running batch, `waits` says why its stages wait, `remarks` which of its metrics are out
    of range. Each remark, and the `why` of a job, has a `key` and `values` for the page's own language beside its
    `text`.
    """
    now = time.time()
    engine, figures = current_batch.engine, current_batch.metrics()
    policy = Policy.WEIGHT if engine is None else engine.settings.policy
    view = view_queue(store, policy, limit, now)
    return {
        "paused": store.paused,
        "rule": policy.value,
        "waits": [] if engine is None else [text for device in engine.status() for text in waiting_texts(device)],
        "remarks": [] if figures is None else [it.as_dict() for it in figures.out_of_range()],
        "counts": {state.value: count for state, count in view.counts.items()},
        "seconds_left": view.seconds_left,
        "jobs": [
            {**_facts(job), "seconds_left": job.seconds_left(now), "why": _why(view.scores.get(job.id))}
            for job in view.jobs
        ],
    }


def _why(score: ScoreBreakdown | None) -> JSON | None:
    return None if score is None else score_message(score).as_dict()


def metrics(store: JobStore | None) -> str:
    """Text for Prometheus: the number of jobs in each state, and the metrics of the current or last batch."""
    counts = store.counts() if store else {}
    lines = [f'i2v_queue_jobs{{state="{state.value}"}} {counts.get(state, 0)}\n' for state in JobState]
    figures = current_batch.metrics()
    return "".join(["# TYPE i2v_queue_jobs gauge\n", *lines]) + (figures.prometheus() if figures else "")


def _facts(record: JobRecord) -> JSON:
    spec = record.spec
    return {
        "id": record.id,
        "state": record.state.value,
        "wish": record.stop_request.value if record.stop_request else None,
        "name": spec.image.name,
        "prompt": spec.prompt,
        "size": str(spec.size),
        "steps": spec.steps,
        "seed": str(spec.seed),  # as text, since JavaScript rounds large numbers
        "priority": spec.priority,
        "pinned": record.position is not None,
        "stage": record.stage,
        "done": record.done,
        "total": record.total,
        "predicted_seconds": record.predicted_seconds,
        "predicted_bytes": record.predicted_bytes,
        "measured_bytes": record.measured_bytes,
        "seconds": seconds_of(record),
        "device": record.device,
        "attempts": record.attempts,
        "problem": record.problem,
        "output": _viewable(record.output),
        "image": host_files.viewable(spec.image),
        "thumbnail": f"{PATH}/{record.id}/thumbnail?of={_stamp(picture_of(record))}",
        "added_at": record.added_at,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
    }


def picture_of(record: JobRecord) -> Path:
    """Path of a frame of the job's video, or, until there is one, of the picture that it begins with."""
    frame = record.thumbnail
    return frame if frame is not None and frame.is_file() else record.spec.image


def _viewable(output: Path | None) -> dict[str, str] | None:
    """Address of a video, or of the first picture of a folder."""
    if output is None or not output.exists():
        return None
    pictures = sorted(output.iterdir()) if output.is_dir() else [output]
    return host_files.viewable(pictures[0]) if pictures else None


def _stamp(file: Path) -> int:
    """Number that changes when the file does (cache buster): the page keeps a picture as long as its address stays."""
    return file.stat().st_mtime_ns if file.is_file() else 0
