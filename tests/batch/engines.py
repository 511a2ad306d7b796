"""Batches for tests: a queue with a local engine on it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from i2v_core.batch.engines.local import LocalEngine
from i2v_core.batch.engines.settings import EngineSettings
from i2v_core.batch.jobs.job import JobSpec, JobState
from i2v_core.batch.jobs.store import JobStore
from i2v_core.batch.monitoring.events import Event, EventKind, Span
from i2v_core.families import I2VModel
from i2v_core.units import MIB

from .conftest import EmulatedDevice, SharedCard

ROOMY = 64 * MIB


class Batch:
    """A queue and a local engine on it; records its events and spans."""

    def __init__(self, folder: Path, model: I2VModel, *devices: EmulatedDevice, **settings: object) -> None:
        self.store = JobStore(folder / "jobs.queue")
        self.output = folder / "out"
        self.events: list[Event] = []
        self.spans: list[Span] = []
        self.on_event: Callable[[Event], None] = self.events.append
        chosen = EngineSettings(output=self.output, retry_seconds=0.0, renew_seconds=0.05)
        self.engine = LocalEngine(
            self.store,
            devices,
            replace(chosen, **settings),  # pyright: ignore[reportArgumentType]
            load=lambda _: model,
            on_event=self._on_event,
            on_span=self.spans.append,
        )

    def _on_event(self, event: Event) -> None:
        self.on_event(event)

    def run(self, *specs: JobSpec) -> tuple[int, ...]:
        ids = self.store.add(specs)
        self.engine.start()
        assert self.engine.join(120), "the engine does not end"
        return ids

    def of(self, kind: EventKind) -> list[Event]:
        return [event for event in self.events if event.kind is kind]

    def states(self) -> Counter[JobState]:
        return Counter(job.state for job in self.store.jobs())


MakeBatch = Callable[..., Batch]


@contextmanager
def batches(folder: Path, model: I2VModel) -> Iterator[MakeBatch]:
    """Makes batches on one queue. Those that still run when the context is left are stopped."""
    made: list[Batch] = []

    def make(*devices: EmulatedDevice, **settings: object) -> Batch:
        made.append(Batch(folder, model, *devices or (EmulatedDevice(card=SharedCard(ROOMY)),), **settings))
        return made[-1]

    yield make
    for batch in made:
        batch.engine.stop()
        assert batch.engine.join(60)
        batch.store.close()


def pixels(path: Path) -> np.ndarray:
    return np.stack([iio.imread(file) for file in sorted(path.iterdir())])


def when(batch: Batch, stage: str, act: Callable[[int], object]) -> None:
    """Calls `act` with the first job that enters a stage, in the engine's thread."""
    done = threading.Event()

    def on_event(event: Event) -> None:
        batch.events.append(event)
        if event.kind is EventKind.STAGE and event.words == stage and not done.is_set():
            done.set()
            assert event.job is not None
            act(event.job)

    batch.on_event = on_event
