"""The queue as the page sees it, as JSON."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..i2v_core.batch.jobs.job import JobRecord, JobState
from ..i2v_core.batch.jobs.store import JobStore
from ..i2v_core.batch.monitoring.report import seconds_of
from ..i2v_core.batch.scheduling.policy import Policy
from ..i2v_core.batch.scheduling.queue_view import listing
from ..i2v_core.words import Message
from . import host_files
from .batch_run import current_batch

JSON = dict[str, Any]

PATH = "/i2v_budget/queue"


def empty_queue() -> JSON:
    """What is said while there is no queue."""
    return {
        "paused": False,
        "rule": Policy.WEIGHT.value,
        "waits": [],
        "remarks": [],
        "counts": {state.value: 0 for state in JobState},
        "seconds_left": None,
        "jobs": [],
    }


def shown_queue(store: JobStore, most: int) -> JSON:
    """At most so many jobs of each state. `rule` is that of the batch that runs, `waits` what its stages wait for,
    `remarks` what of its figures is not as it should be; these and the `why` of a job have a `key` and `values` for
    the page's own language beside their `text`.
    """
    now = time.time()
    engine, figures = current_batch.engine, current_batch.metrics()
    rule = Policy.WEIGHT if engine is None else engine.settings.policy
    found = listing(store, rule, most, now)
    return {
        "paused": store.paused,
        "rule": rule.value,
        "waits": [] if engine is None else [words for device in engine.status() for words in device.waits],
        "remarks": [] if figures is None else [it.as_dict() for it in figures.out_of_range()],
        "counts": {state.value: count for state, count in found.counts.items()},
        "seconds_left": found.seconds_left,
        "jobs": [
            {**_facts(job), "seconds_left": job.seconds_left(now), "why": _said(found.why.get(job.id))}
            for job in found.jobs
        ],
    }


def _said(sentence: Message | None) -> JSON | None:
    return None if sentence is None else sentence.as_dict()


def metrics(store: JobStore | None) -> str:
    """In Prometheus' text format: the jobs of each state, and the figures of the batch that runs or has run last."""
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
    """What stands for a job: a frame of its video when there is one, until then the picture that it begins with."""
    found = record.thumbnail
    return found if found is not None and found.is_file() else record.spec.image


def _viewable(output: Path | None) -> dict[str, str] | None:
    """A video, or the first of a folder of pictures."""
    if output is None or not output.exists():
        return None
    pictures = sorted(output.iterdir()) if output.is_dir() else [output]
    return host_files.viewable(pictures[0]) if pictures else None


def _stamp(file: Path) -> int:
    """Another when the file is; the page keeps a picture for as long as its address stays."""
    return file.stat().st_mtime_ns if file.is_file() else 0
