"""Runs a batch while its node runs: progress on the page, the user's interrupt, and data for the sidebar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management as management
import comfy.utils

from ..i2v_core.batch.engines.local import LocalEngine
from ..i2v_core.batch.engines.settings import EngineSettings
from ..i2v_core.batch.jobs.job import JobRecord, JobSpec, JobState
from ..i2v_core.batch.jobs.store import FilteredJobStore
from ..i2v_core.batch.monitoring.events import Span
from ..i2v_core.batch.monitoring.metrics import BatchMetrics, MetricsCollector, read_cards
from ..i2v_core.batch.monitoring.report import summary
from ..i2v_core.batch.scheduling.estimator import plan_key
from ..i2v_core.batch.scheduling.policy import Policy
from ..i2v_core.families import I2VModel, load_model, read_architecture
from ..i2v_core.planning.plan import Stage
from .batch_device import HostDevice

_POLL_SECONDS = 0.5
_TICKS_PER_JOB = 100  # resolution of the progress bar
# Where in a job a stage begins, and its share of the job: about as long as they take.
_SHARES = {Stage.ENCODE.value: (0.0, 0.1), Stage.SAMPLE.value: (0.1, 0.7), Stage.DECODE.value: (0.8, 0.2)}


class CurrentBatch:
    """The batch that is running, or that ran last in this host, for the routes that show the queue."""

    def __init__(self) -> None:
        self.engine: LocalEngine | None = None
        self._collector: MetricsCollector | None = None
        self._last: BatchMetrics | None = None

    @contextmanager
    def running(self, engine: LocalEngine, collector: MetricsCollector) -> Iterator[None]:
        """Publish a batch while it runs, and keep its metrics afterwards."""
        self.engine, self._collector = engine, collector
        try:
            yield
        finally:
            self._last = collector.figures()
            self.engine = self._collector = None

    def metrics(self) -> BatchMetrics | None:
        """Return the metrics of the current or last batch; None before the first."""
        engine, collector = self.engine, self._collector
        return self._last if engine is None or collector is None else collector.figures(engine.status())


current_batch = CurrentBatch()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """The jobs, metrics and stage times of a batch that has ended."""

    records: tuple[JobRecord, ...]
    metrics: BatchMetrics
    spans: tuple[Span, ...]


def enqueue(store: FilteredJobStore, specs: Iterable[JobSpec]) -> None:
    """Add jobs to the queue and select them; retry those that failed, were cancelled or have lost their video."""
    specs = tuple(specs)
    ids = store.add(specs)
    store.choose(ids)
    records = {record.id: record for record in store.chosen()}
    for job_id, spec in zip(ids, specs, strict=True):
        record = records[job_id]
        if record.spec.priority != spec.priority:
            store.set_priority(job_id, spec.priority)
        lost = record.state is JobState.DONE and not (record.output and record.output.exists())
        if lost or record.state in (JobState.FAILED, JobState.CANCELLED):
            store.retry(job_id)


def run(
    store: FilteredJobStore,
    model: I2VModel,
    devices: Sequence[HostDevice],
    policy: Policy,
    output: Path,
    send_text: Callable[[str], None],
) -> BatchResult:
    """Run the selected jobs until all of them have ended.

    When the user interrupts, running jobs keep their checkpoints and return to the queue.
    """
    collector, spans = MetricsCollector(kind_of=lambda job: plan_key(store.job(job).spec)), list[Span]()

    def on_span(span: Span) -> None:
        collector.on_span(span)
        spans.append(span)

    engine = LocalEngine(
        store,
        devices,
        EngineSettings(output=output, policy=policy),
        load=lambda folder: model if folder == model.folder else load_model(folder),
        on_event=collector.on_event,
        on_span=on_span,
        # The folder alone does not show that some of the model's weights come from another file.
        architecture=lambda folder: model.architecture if folder == model.folder else read_architecture(folder),
    )
    progress = _Progress(store, send_text)
    with current_batch.running(engine, collector):
        engine.start()
        try:
            while not engine.join(_POLL_SECONDS):
                management.throw_exception_if_processing_interrupted()
                collector.sample(read_cards())
                progress.show()
        finally:
            engine.stop()
            engine.join()
            management.soft_empty_cache()
    progress.show()
    return BatchResult(records=store.chosen(), metrics=collector.figures(), spans=tuple(spans))


class _Progress:
    """Shows all jobs on the node's progress bar, and the running ones as text."""

    def __init__(self, store: FilteredJobStore, send_text: Callable[[str], None]) -> None:
        self._store, self._send_text = store, send_text
        self._bar = comfy.utils.ProgressBar(_TICKS_PER_JOB)

    def show(self) -> None:
        counts = self._store.counts()
        running = [it for it in self._store.chosen(JobState.RUNNING) if it.stage is not None and it.total > 0]
        done = sum(count for state, count in counts.items() if state.is_final) + sum(map(_share_done, running))
        self._bar.update_absolute(int(_TICKS_PER_JOB * done), _TICKS_PER_JOB * sum(counts.values()))
        lines = [f"{it.spec.image.name}: {it.stage} {it.done} of {it.total}" for it in running]
        paused = ["the queue is paused: resume it in the sidebar"] if self._store.paused else []
        self._send_text("\n".join([summary(counts), *paused, *lines]))


def _share_done(record: JobRecord) -> float:
    """Return the share of a running job that is done, 0 to 1."""
    begin, share = _SHARES.get(record.stage or "", (0.0, 0.0))
    return begin + share * record.done / record.total
