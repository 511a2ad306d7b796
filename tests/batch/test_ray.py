"""The engine of a cluster on a real Ray of this machine: one of two workers is killed while it runs jobs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from i2v_core.batch.engines.ray_cluster import LOCAL
from i2v_core.batch.engines.ray_driver import RayEngine
from i2v_core.batch.engines.settings import EngineSettings
from i2v_core.batch.jobs.job import JobState
from i2v_core.batch.jobs.store import JobStore
from i2v_core.batch.monitoring.events import Event, EventKind
from i2v_core.errors import MissingPackageError
from i2v_core.sampling.checkpoint import CheckpointWhen

from .conftest import MakeJob


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no kill -9")
def test_a_worker_that_is_killed_costs_no_job(tmp_path: Path, make_job: MakeJob, survived: Counter[str]) -> None:
    pytest.importorskip("ray")
    store = JobStore(tmp_path / "jobs.queue")
    specs = [make_job(seed, steps=12) for seed in range(5)]
    ids = store.add([*specs, make_job(9, image=Path("gone.png"))])
    settings = EngineSettings(
        output=tmp_path / "out",
        checkpoints=CheckpointWhen.EVERY_STEP,
        max_in_flight=2,
        attempts=3,
        retry_seconds=0.0,
        renew_seconds=0.2,
    )
    events: list[Event] = []
    first_done = threading.Event()

    def on_event(event: Event) -> None:
        events.append(event)
        if event.kind is EventKind.DONE:
            first_done.set()

    engine = RayEngine(store, LOCAL, settings, cpu_workers=2, on_event=on_event)
    engine.start()
    assert first_done.wait(300)
    pids = engine.worker_pids()
    assert len(set(pids.values())) == 2
    victim = next(job.device for job in store.jobs(JobState.RUNNING) if job.device)
    os.kill(pids[victim], signal.SIGKILL)
    assert engine.join(300)

    assert [event.device for event in events if event.kind is EventKind.DEVICE_LOST] == [victim]
    states = [store.job(job_id).state for job_id in ids]
    assert states == [JobState.DONE] * len(specs) + [JobState.FAILED]
    assert Counter(event.job for event in events if event.kind is EventKind.DONE) == Counter(ids[:-1])
    assert "gone.png" in (store.job(ids[-1]).problem or "")
    for job_id, spec in zip(ids, specs, strict=False):
        job = store.job(job_id)
        assert job.output == tmp_path / "out" / spec.output_name
        assert job.output is not None
        assert job.output.is_file()
        assert job.report is not None
        assert job.thumbnail is not None
    store.close()
    survived["killed workers of a cluster"] += 1


def test_without_ray_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # an import of it raises ImportError
    store = JobStore(tmp_path / "jobs.queue")
    with pytest.raises(MissingPackageError, match="pip install ray"):
        RayEngine(store, LOCAL, EngineSettings(output=tmp_path))
    store.close()
