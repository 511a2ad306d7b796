"""Terminal output of a batch: a progress bar, a line for each finished job, and a summary."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...errors import I2VError
from ...units import format_gib
from ..engines.engine import BatchEngine
from ..jobs.job import JobState
from ..jobs.store import JobStore
from ..monitoring.events import Event, EventKind, Span
from ..monitoring.messages import waiting_texts
from ..monitoring.metrics import MetricsCollector, read_cards
from ..monitoring.report_picture import draw_batch
from ..scheduling.estimator import plan_key

_PRINTED = (EventKind.DONE, EventKind.FOUND, EventKind.FAILED, EventKind.RETRY, EventKind.DEVICE_LOST)
_COUNTED = (EventKind.DONE, EventKind.FOUND, EventKind.FAILED)


def say(line: str) -> None:
    """Write a line to standard output, above the bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


class Console:
    """Listens to an engine and writes; the bar goes to standard error, and only if that is a terminal."""

    def __init__(self, jobs: int, store: JobStore) -> None:
        self._bar: Any = tqdm(total=jobs, unit="job", disable=None, file=sys.stderr, dynamic_ncols=True)
        self._metrics = MetricsCollector(kind_of=lambda job: plan_key(store.job(job).spec))
        self._spans: list[Span] = []

    def on_event(self, event: Event) -> None:
        if event.kind in _PRINTED:
            subject = event.device if event.job is None else f"job {event.job}"
            say(f"{subject} {event.kind.value}: {event.words}")
        self._metrics.on_event(event)
        if event.kind in _COUNTED:
            self._bar.update(1)

    def on_span(self, span: Span) -> None:
        self._metrics.on_span(span)
        self._spans.append(span)

    def draw(self, path: Path) -> None:
        """Draw what has run, if anything has; an error is only written."""
        if not self._spans:
            return
        try:
            draw_batch(self._spans, self._metrics.figures(), path)
        except I2VError as error:
            say(str(error))

    def show(self, engine: BatchEngine, ids: Sequence[int]) -> None:
        """Update the bar with what runs now; call it from time to time."""
        self._metrics.sample(read_cards())
        if self._bar.disable:
            return
        running = [job for job in engine.store.jobs(JobState.RUNNING) if job.id in ids and job.stage]
        parts = [f"{job.stage} {job.done}/{job.total}" for job in running]
        for device in engine.status():
            parts.append(f"{format_gib(device.reserved_bytes)} of {format_gib(device.room.usable_bytes)}")
            parts += waiting_texts(device)
        self._bar.set_postfix_str(", ".join(parts))

    def summary(self, store: JobStore, ids: Sequence[int]) -> int:
        """Write how the jobs have ended; return how many are not done."""
        self._bar.clear()
        jobs = store.records(ids)
        for job in jobs:
            if job.state is JobState.FAILED:
                say(f"failed after {job.attempts} attempts: {job.spec.image.name}: {job.problem}")
        done = sum(job.state is JobState.DONE for job in jobs)
        metrics = self._metrics.figures()
        pace = f", {metrics.jobs_an_hour:.1f} jobs an hour" if metrics.done else ""
        say(f"{done} of {len(jobs)} done{pace}")
        for remark in metrics.out_of_range():
            say(str(remark))
        return len(jobs) - done

    def close(self) -> None:
        self._bar.close()
