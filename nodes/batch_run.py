"""Runs jobs while their node runs: progress on the page, the user's interrupt, and what the sidebar asks meanwhile."""

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

_LOOK_EVERY_SECONDS = 0.5
_PARTS = 100  # of a job, for the progress bar
# Where in a job a stage begins, and how much of it the stage is: about as long as they take.
_SHARES = {Stage.ENCODE.value: (0.0, 0.1), Stage.SAMPLE.value: (0.1, 0.7), Stage.DECODE.value: (0.8, 0.2)}


class CurrentBatch:
    """The batch that runs now, or has run last in this host, for who looks at the queue."""

    def __init__(self) -> None:
        self.engine: LocalEngine | None = None
        self._watch: MetricsCollector | None = None
        self._last: BatchMetrics | None = None

    @contextmanager
    def listing(self, engine: LocalEngine, watch: MetricsCollector) -> Iterator[None]:
        """While the batch runs."""
        self.engine, self._watch = engine, watch
        try:
            yield
        finally:
            self._last = watch.figures()
            self.engine = self._watch = None

    def figures(self) -> BatchMetrics | None:
        """None where none has run."""
        engine, watch = self.engine, self._watch
        return self._last if engine is None or watch is None else watch.figures(engine.status())


board = CurrentBatch()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """What a batch has come to."""

    records: tuple[JobRecord, ...]
    figures: BatchMetrics
    spans: tuple[Span, ...]


def asked_again(part: FilteredJobStore, specs: Iterable[JobSpec]) -> None:
    """Adds jobs to the queue and chooses them; those that are there already wait again where they are not done."""
    specs = tuple(specs)
    ids = part.add(specs)
    part.choose(ids)
    records = {record.id: record for record in part.chosen()}
    for job_id, spec in zip(ids, specs, strict=True):
        record = records[job_id]
        if record.spec.priority != spec.priority:
            part.set_priority(job_id, spec.priority)
        lost = record.state is JobState.DONE and not (record.output and record.output.exists())
        if lost or record.state in (JobState.FAILED, JobState.CANCELLED):
            part.retry(job_id)


def run(
    part: FilteredJobStore,
    model: I2VModel,
    devices: Sequence[HostDevice],
    rule: Policy,
    output: Path,
    say: Callable[[str], None],
) -> BatchResult:
    """The chosen jobs, until none of them waits or runs.

    When the user interrupts, those in hand keep their checkpoints and wait again.
    """
    watch, spans = MetricsCollector(kind_of=lambda job: plan_key(part.job(job).spec)), list[Span]()

    def ended(span: Span) -> None:
        watch.on_span(span)
        spans.append(span)

    engine = LocalEngine(
        part,
        devices,
        EngineSettings(output=output, policy=rule),
        load=lambda folder: model if folder == model.folder else load_model(folder),
        on_event=watch.on_event,
        on_span=ended,
        # Where a file has some of the model's weights, its folder does not say so.
        architecture=lambda folder: model.architecture if folder == model.folder else read_architecture(folder),
    )
    progress = _Progress(part, say)
    with board.listing(engine, watch):
        engine.start()
        try:
            while not engine.join(_LOOK_EVERY_SECONDS):
                management.throw_exception_if_processing_interrupted()
                watch.sample(read_cards())
                progress.show()
        finally:
            engine.stop()
            engine.join()
            management.soft_empty_cache()
    progress.show()
    return BatchResult(records=part.chosen(), figures=watch.figures(), spans=tuple(spans))


class _Progress:
    """Of all jobs on the node's bar, and of those in hand in words."""

    def __init__(self, part: FilteredJobStore, say: Callable[[str], None]) -> None:
        self._part, self._say = part, say
        self._bar = comfy.utils.ProgressBar(_PARTS)

    def show(self) -> None:
        counts = self._part.counts()
        now = [it for it in self._part.chosen(JobState.RUNNING) if it.stage is not None and it.total > 0]
        done = sum(count for state, count in counts.items() if state.is_final) + sum(map(_share_done, now))
        self._bar.update_absolute(int(_PARTS * done), _PARTS * sum(counts.values()))
        lines = [f"{it.spec.image.name}: {it.stage} {it.done} of {it.total}" for it in now]
        paused = ["the queue is paused: resume it in the sidebar"] if self._part.paused else []
        self._say("\n".join([summary(counts), *paused, *lines]))


def _share_done(record: JobRecord) -> float:
    """Of a job that runs, 0 to 1."""
    begin, share = _SHARES.get(record.stage or "", (0.0, 0.0))
    return begin + share * record.done / record.total
