"""What a batch says on a terminal: a bar, a line for each job that is over, and the sum in the end."""

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
from ..monitoring.metrics import MetricsCollector, read_cards
from ..monitoring.report_picture import draw_batch
from ..scheduling.estimator import plan_key

_SAID = (EventKind.DONE, EventKind.FOUND, EventKind.FAILED, EventKind.RETRY, EventKind.DEVICE_LOST)
_COUNTED = (EventKind.DONE, EventKind.FOUND, EventKind.FAILED)


def say(line: str) -> None:
    """On standard output, above the bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


class Console:
    """The bar goes to standard error, and only where that is a terminal."""

    def __init__(self, jobs: int, store: JobStore) -> None:
        self._bar: Any = tqdm(total=jobs, unit="job", disable=None, file=sys.stderr, dynamic_ncols=True)
        self.watch = MetricsCollector(kind_of=lambda job: plan_key(store.job(job).spec))
        self._spans: list[Span] = []

    def on_event(self, event: Event) -> None:
        if event.kind in _SAID:
            who = event.device if event.job is None else f"job {event.job}"
            say(f"{who} {event.kind.value}: {event.words}")
        self.watch.on_event(event)
        if event.kind in _COUNTED:
            self._bar.update(1)

    def on_span(self, span: Span) -> None:
        self.watch.on_span(span)
        self._spans.append(span)

    def draw(self, path: Path) -> None:
        """A picture of what has run, where anything has; that it cannot be drawn is said, and no more."""
        if not self._spans:
            return
        try:
            draw_batch(self._spans, self.watch.figures(), path)
        except I2VError as error:
            say(str(error))

    def show(self, engine: BatchEngine, ids: Sequence[int]) -> None:
        """What is under way now; to be called from time to time."""
        self.watch.sample(read_cards())
        if self._bar.disable:
            return
        running = [job for job in engine.store.jobs(JobState.RUNNING) if job.id in ids and job.stage]
        parts = [f"{job.stage} {job.done}/{job.total}" for job in running]
        for device in engine.status():
            parts.append(f"{format_gib(device.reserved_bytes)} of {format_gib(device.room.usable_bytes)}")
            parts += device.waits
        self._bar.set_postfix_str(", ".join(parts))

    def summary(self, store: JobStore, ids: Sequence[int]) -> int:
        """Says how the jobs have ended; how many are not done."""
        self._bar.clear()
        wanted = set(ids)
        jobs = [job for job in store.jobs() if job.id in wanted]
        for job in jobs:
            if job.state is JobState.FAILED:
                say(f"failed after {job.attempts} attempts: {job.spec.image.name}: {job.problem}")
        done = sum(job.state is JobState.DONE for job in jobs)
        figures = self.watch.figures()
        pace = f", {figures.jobs_an_hour:.1f} jobs an hour" if figures.done else ""
        say(f"{done} of {len(jobs)} done{pace}")
        for remark in figures.out_of_range():
            say(str(remark))
        return len(jobs) - done

    def close(self) -> None:
        self._bar.close()
