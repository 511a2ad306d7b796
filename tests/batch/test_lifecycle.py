"""The life of a job in both engines: taken up, finished, failed, tried again, released, and lost to another process.

The local engine and the Ray driver run the same tests, on stages that do nothing but what a test says. Ray is an
in-process stand-in; `test_ray.py` runs the driver on a real one.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from i2v_core.batch.devices.device import DeviceLostError, LocalDevice
from i2v_core.batch.engines import local, ray_driver
from i2v_core.batch.engines.device_worker import device_worker
from i2v_core.batch.engines.engine import BatchEngine
from i2v_core.batch.engines.lease_keeper import LeaseKeeper
from i2v_core.batch.engines.lifecycle import JobLifecycle
from i2v_core.batch.engines.local import LocalEngine
from i2v_core.batch.engines.ray_cluster import LOCAL
from i2v_core.batch.engines.ray_driver import RayEngine
from i2v_core.batch.engines.ray_worker import BatchWorker, WorkerDescription
from i2v_core.batch.engines.settings import EngineSettings
from i2v_core.batch.execution.model_cache import ModelCache
from i2v_core.batch.execution.running_job import RunningJob
from i2v_core.batch.execution.stage_runner import StageRunner
from i2v_core.batch.execution.video_writer import AsyncVideoWriter
from i2v_core.batch.jobs.job import JobSpec, JobState
from i2v_core.batch.jobs.leases import LeaseManager
from i2v_core.batch.jobs.store import JobStore
from i2v_core.batch.monitoring.events import Event, EventKind
from i2v_core.batch.scheduling import estimator
from i2v_core.batch.scheduling.policy import Policy
from i2v_core.errors import BadInputError, FileError
from i2v_core.families import I2VModel
from i2v_core.planning.plan import Plan
from i2v_core.sampling.checkpoint import CheckpointWhen
from i2v_core.units import GIB

from .conftest import MakeJob
from .fake_ray import FakeRay

pytestmark = pytest.mark.usefixtures("one_thread", "stages")

RENEW_SECONDS, PATIENCE_SECONDS = 0.05, 60


@dataclass
class Stages:
    """The stubbed stages' actions: `run` in place of the first stage, `end` before the video is written."""

    run: Callable[[RunningJob], None] = lambda _: None
    end: Callable[[RunningJob], None] = lambda _: None
    begun: list[str] = field(default_factory=list[str])
    """Keys of the jobs, once for each run."""


@pytest.fixture(scope="module")
def plans() -> dict[object, Plan]:
    return {}


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, tiny_model: I2VModel, plans: dict[object, Plan]) -> Stages:
    """Replaces stages, loading and planning, which take long and are tested elsewhere."""
    stubs = Stages()

    def encode(_: StageRunner, job: RunningJob, model: I2VModel) -> None:
        stubs.begun.append(job.spec.key)
        job.samples = torch.zeros(1)
        stubs.run(job)

    def decode(_: StageRunner, job: RunningJob, model: I2VModel, writer: AsyncVideoWriter) -> None:
        stubs.end(job)
        writer.put(torch.zeros(2, 64, 64, 3))
        writer.finish()

    make_plan = estimator.make_plan

    def planned_once(request: object, *rest: object) -> Plan:
        if request not in plans:
            plans[request] = make_plan(request, *rest)  # pyright: ignore[reportArgumentType]
        return plans[request]

    monkeypatch.setattr(StageRunner, "encode", encode)
    monkeypatch.setattr(StageRunner, "decode", decode)
    monkeypatch.setattr(ModelCache, "model", lambda *_: tiny_model)
    monkeypatch.setattr(estimator, "make_plan", planned_once)
    return stubs


def until_stopped(job: RunningJob) -> None:
    """A stage that only ends when its job is told to stop."""
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        job.check()
        time.sleep(0.01)
    raise AssertionError("the job was not told to stop")


class Batch:
    """A queue, and the engine under test with so many devices on it; records events with their times."""

    def __init__(self, kind: str, folder: Path, devices: int, **settings: object) -> None:
        self.store = JobStore(folder / "jobs.queue")
        self.events: list[tuple[float, Event]] = []
        self.output = folder / "out"
        chosen = EngineSettings(output=self.output, retry_seconds=0.0, renew_seconds=RENEW_SECONDS)
        chosen = replace(chosen, **settings)  # pyright: ignore[reportArgumentType]
        self.engine = self._engine(kind, devices, chosen)
        self.other = LeaseManager(self.store)
        """Another process that uses the queue."""

    def _engine(self, kind: str, devices: int, settings: EngineSettings) -> BatchEngine:
        if kind == "ray":
            return RayEngine(self.store, LOCAL, settings, limit_bytes=GIB, cpu_workers=devices, on_event=self._on_event)
        own = [_NamedDevice(f"cpu {index}") for index in range(devices)]
        return LocalEngine(self.store, own, settings, on_event=self._on_event)

    def _on_event(self, event: Event) -> None:
        self.events.append((time.monotonic(), event))

    def run(self, *specs: JobSpec) -> tuple[int, ...]:
        ids = self.store.add(specs)
        self.engine.start()
        assert self.engine.join(PATIENCE_SECONDS), "the engine does not end"
        return ids

    def of(self, kind: EventKind) -> list[Event]:
        return [event for _, event in self.events if event.kind is kind]

    def times(self, kind: EventKind) -> list[float]:
        return [at for at, event in self.events if event.kind is kind]

    def states(self) -> Counter[JobState]:
        return Counter(job.state for job in self.store.jobs())

    def take_over(self, job_id: int) -> None:
        """Gives a job to the other process, as after a lease that has expired."""
        with self.store.database.transaction() as connection:
            connection.execute("UPDATE jobs SET owner = ? WHERE id = ?", (self.other.owner, job_id))

    def id_of(self, job: RunningJob) -> int:
        """The job's id in this queue; a worker of a cluster has a queue of its own."""
        return next(it.id for it in self.store.jobs() if it.spec.key == job.spec.key)


class _NamedDevice(LocalDevice):
    """The CPU by another name, since an engine's devices must differ in theirs."""

    def __init__(self, name: str) -> None:
        super().__init__(torch_device=torch.device("cpu"), limit_bytes=GIB)
        object.__setattr__(self, "_name", name)

    @property
    def name(self) -> str:
        return self._name  # pyright: ignore[reportAttributeAccessIssue]


MakeBatch = Callable[..., Batch]


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray = FakeRay()
    monkeypatch.setattr(ray_driver, "import_ray", lambda: ray)
    return ray


@pytest.fixture(params=["local", "ray"])
def make_batch(request: pytest.FixtureRequest, tmp_path: Path, fake_ray: FakeRay) -> Iterator[MakeBatch]:
    made: list[Batch] = []

    def make(devices: int = 1, **settings: object) -> Batch:
        made.append(Batch(request.param, tmp_path, devices, **settings))
        return made[-1]

    yield make
    for batch in made:
        batch.engine.stop()
        batch.engine._over.wait(PATIENCE_SECONDS)  # pyright: ignore[reportPrivateUsage]
        batch.store.close()


# Taken up and finished.


def test_jobs_are_taken_up_and_finished(make_batch: MakeBatch, make_job: MakeJob) -> None:
    batch = make_batch()
    specs = [make_job(seed) for seed in range(3)]
    ids = batch.run(*specs)
    assert batch.states() == {JobState.DONE: 3}
    assert Counter(event.job for event in batch.of(EventKind.STARTED)) == Counter(ids)
    assert Counter(event.job for event in batch.of(EventKind.DONE)) == Counter(ids)
    for job, spec in zip(batch.store.jobs(), specs, strict=True):
        assert job.output == batch.output / spec.output_name
        assert (batch.output / spec.output_name).is_file()
        assert job.report is not None
        assert job.thumbnail is not None
        assert job.thumbnail.is_file()


@pytest.mark.parametrize("clips", [1, 3])
def test_every_setting_reaches_the_device(
    make_batch: MakeBatch, make_job: MakeJob, clips: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[EngineSettings] = []

    def record(*args: object) -> object:
        reached.append(next(it for it in args if isinstance(it, EngineSettings)))
        return device_worker(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(local, "device_worker", record)
    batch = make_batch(
        devices=2,
        clips_at_once=clips,
        policy=Policy.FIRST_COME,
        max_in_flight=3,
        memory_wait_seconds=7.0,
        checkpoints=CheckpointWhen.EVERY_STEP,
        lease_seconds=30.0,
    )
    batch.run(make_job())
    assert len(reached) == 2
    # These are for who takes jobs from the queue that users see: on a cluster, for the driver alone.
    by_driver = {"work": None, "attempts": 0, "retry_seconds": 0.0, "waits_for_more": False}
    for settings in reached:
        assert replace(settings, **by_driver) == replace(batch.engine.settings, **by_driver)


def test_a_video_that_is_there_already_is_not_made_again(
    make_batch: MakeBatch, make_job: MakeJob, stages: Stages
) -> None:
    batch = make_batch()
    spec = make_job()
    batch.output.mkdir()
    (batch.output / spec.output_name).write_bytes(b"a whole video")
    (job,) = batch.run(spec)
    assert batch.store.job(job).state is JobState.DONE
    assert [event.kind for _, event in batch.events] == [EventKind.FOUND]
    assert not stages.begun


def test_a_job_that_cannot_run_is_set_aside_and_the_others_run(make_batch: MakeBatch, make_job: MakeJob) -> None:
    batch = make_batch()
    bad, _ = batch.run(make_job(0, model=Path("absent")), make_job(1))
    assert batch.states() == {JobState.DONE: 1, JobState.FAILED: 1}
    assert [event.job for event in batch.of(EventKind.FAILED)] == [bad]
    assert bad not in [event.job for event in batch.of(EventKind.STARTED)]
    assert "absent" in (batch.store.job(bad).problem or "")


def test_while_the_queue_is_paused_nothing_is_begun(make_batch: MakeBatch, make_job: MakeJob) -> None:
    batch = make_batch()
    batch.engine.pause()
    batch.store.add([make_job()])
    batch.engine.start()
    assert not batch.engine.join(10 * RENEW_SECONDS)
    assert not batch.events
    batch.engine.resume()
    assert batch.engine.join(PATIENCE_SECONDS)
    assert batch.states() == {JobState.DONE: 1}


# Failed and tried again.


def test_each_retry_waits_twice_as_long_as_the_one_before(
    make_batch: MakeBatch, make_job: MakeJob, stages: Stages
) -> None:
    def fail(_: RunningJob) -> None:
        raise FileError("the disk is full", "free some")

    stages.run = fail
    batch = make_batch(attempts=4, retry_seconds=0.3)
    (job,) = batch.run(make_job())
    assert (batch.store.job(job).state, batch.store.job(job).attempts) == (JobState.FAILED, 4)
    assert len(stages.begun) == 4
    assert [event.words for event in batch.of(EventKind.RETRY)] == ["the disk is full. Remedy: free some."] * 3
    assert len(batch.of(EventKind.FAILED)) == 1
    started, failed = batch.times(EventKind.STARTED)[1:], batch.times(EventKind.RETRY)
    waited = [start - fail for start, fail in zip(started, failed, strict=True)]
    # Less what passes between the decision and its event.
    assert all(seconds > 0.3 * 2**attempt - 0.15 for attempt, seconds in enumerate(waited)), waited


def test_a_permanent_failure_is_not_tried_again(make_batch: MakeBatch, make_job: MakeJob, stages: Stages) -> None:
    def fail(_: RunningJob) -> None:
        raise BadInputError("the picture cannot be read any more", "put it back")

    stages.run = fail
    batch = make_batch()
    (job,) = batch.run(make_job())
    assert (batch.store.job(job).state, batch.store.job(job).attempts) == (JobState.FAILED, 1)
    assert not batch.of(EventKind.RETRY)
    assert (batch.store.job(job).report or {})["permanent"]


def test_jobs_of_a_lost_device_are_done_by_another(
    make_batch: MakeBatch, make_job: MakeJob, stages: Stages, survived: Counter[str]
) -> None:
    first = iter([True])

    def fail_once(_: RunningJob) -> None:
        if next(first, False):
            raise DeviceLostError("it has fallen off the bus")

    stages.run = fail_once
    batch = make_batch(devices=2)
    batch.run(*map(make_job, range(4)))
    assert batch.states() == {JobState.DONE: 4}
    (lost,) = batch.of(EventKind.DEVICE_LOST)
    retries = batch.of(EventKind.RETRY)
    # One job, and on a cluster those that had not been given back when the worker was restarted.
    assert {event.device for event in retries} == {lost.device}
    assert all(batch.store.job(event.job or 0).device != lost.device for event in retries)
    survived["lost cards"] += 1


def test_an_engine_whose_queue_fails_ends_and_says_why(
    make_batch: MakeBatch, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch()
    claim = LeaseManager.claim

    def fail(leases: LeaseManager, *args: object) -> object:
        if leases is batch.engine.leases:
            raise FileError("the disk is full", "free some")
        return claim(leases, *args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(LeaseManager, "claim", fail)
    with pytest.raises(FileError, match="the disk is full"):
        batch.run(make_job())


# Stopped and released.


@pytest.mark.parametrize("by", ["the engine", "another process"])
@pytest.mark.parametrize("state", [JobState.CANCELLED, JobState.PAUSED])
def test_a_stop_request_reaches_the_job_wherever_it_runs(
    make_batch: MakeBatch, make_job: MakeJob, stages: Stages, by: str, state: JobState, survived: Counter[str]
) -> None:
    batch = make_batch()

    def request_stop(job: RunningJob) -> None:
        if job.spec.seed == 0:
            on_store = batch.store.cancel if state is JobState.CANCELLED else batch.store.pause
            on_engine = batch.engine.cancel if state is JobState.CANCELLED else batch.engine.pause_job
            (on_engine if by == "the engine" else on_store)(batch.id_of(job))
            until_stopped(job)

    stages.run = request_stop
    stopped, other = batch.run(make_job(0), make_job(1))
    assert (batch.store.job(stopped).state, batch.store.job(other).state) == (state, JobState.DONE)
    assert [(event.job, event.words) for event in batch.of(EventKind.GIVEN_BACK)] == [(stopped, state.value)]
    survived["cancels in a batch"] += 1


def test_an_engine_that_stops_gives_its_jobs_back(make_batch: MakeBatch, make_job: MakeJob, stages: Stages) -> None:
    batch = make_batch()

    def stop(job: RunningJob) -> None:
        batch.engine.stop()
        until_stopped(job)

    stages.run = stop
    batch.run(*map(make_job, range(2)))
    assert batch.states() == {JobState.WAITING: 2}
    assert {event.words for event in batch.of(EventKind.GIVEN_BACK)} == {"stopped"}
    assert all(job.attempts == 0 and job.owner is None for job in batch.store.jobs())


# Lost to another process.


def assert_lost(batch: Batch, job: int) -> None:
    """The job is still the other process's, and nothing else is said of it."""
    over = {EventKind.DONE, EventKind.FAILED, EventKind.RETRY, EventKind.GIVEN_BACK}
    said = [(event.kind, event.words) for _, event in batch.events if event.job == job and event.kind in over]
    assert said == [(EventKind.GIVEN_BACK, "lost")]


def test_a_job_whose_lease_is_lost_stops(
    make_batch: MakeBatch, make_job: MakeJob, stages: Stages, survived: Counter[str]
) -> None:
    batch = make_batch()

    def lose(job: RunningJob) -> None:
        batch.take_over(batch.id_of(job))
        try:
            until_stopped(job)
        finally:
            batch.other.finish(batch.id_of(job), Path("elsewhere.mp4"), None, None)

    stages.run = lose
    (job,) = batch.run(make_job())
    assert_lost(batch, job)
    assert batch.store.job(job).output == Path("elsewhere.mp4")
    assert not list(batch.output.glob("*.mp4"))
    survived["lost leases"] += 1


def at_the_end(batch: Batch, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Has the other process take a job over at the moment at which the engine tells the queue how it ended."""
    whole = getattr(LeaseManager, method)

    def lost(leases: LeaseManager, job_id: int, *args: object, **options: object) -> object:
        if leases is not batch.engine.leases:
            return whole(leases, job_id, *args, **options)
        batch.take_over(job_id)
        found = whole(leases, job_id, *args, **options)
        assert batch.store.job(job_id).owner == batch.other.owner
        batch.other.finish(job_id, Path("elsewhere.mp4"), None, None)
        return found

    monkeypatch.setattr(LeaseManager, method, lost)


def test_done_is_not_announced_of_a_job_that_another_process_runs(
    make_batch: MakeBatch, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch()
    at_the_end(batch, monkeypatch, "finish")
    (job,) = batch.run(make_job())
    assert_lost(batch, job)
    assert batch.store.job(job).output == Path("elsewhere.mp4")


def test_a_failure_is_not_announced_of_a_job_that_another_process_runs(
    make_batch: MakeBatch, make_job: MakeJob, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: RunningJob) -> None:
        raise FileError("the disk is full", "free some")

    stages.run = fail
    batch = make_batch()
    at_the_end(batch, monkeypatch, "fail")
    (job,) = batch.run(make_job())
    assert_lost(batch, job)
    assert batch.store.job(job).problem is None


def test_a_job_that_is_claimed_again_while_it_still_runs_goes_on(
    make_batch: MakeBatch, make_job: MakeJob, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a long sleep of the machine, another process has put the job back, before this one renews its leases."""
    monkeypatch.setattr(LeaseKeeper, "renew", lambda _: None)
    batch = make_batch()

    def put_back(job: RunningJob) -> None:
        with batch.store.database.transaction() as connection:
            connection.execute("UPDATE jobs SET state = 'waiting', owner = NULL, lease_until = NULL")
        batch.engine.wake()
        until = time.monotonic() + PATIENCE_SECONDS
        while batch.store.job(batch.id_of(job)).state is JobState.WAITING and time.monotonic() < until:
            time.sleep(0.01)

    stages.end = put_back
    batch.run(make_job())
    assert batch.states() == {JobState.DONE: 1}
    assert len(stages.begun) == len(batch.of(EventKind.STARTED)) == len(batch.of(EventKind.DONE)) == 1


def test_jobs_of_processes_that_have_ended_are_taken_up(make_batch: MakeBatch, make_job: MakeJob) -> None:
    batch = make_batch(waits_for_more=True)
    batch.engine.start()
    (job,) = batch.store.add([make_job()])
    with batch.store.database.transaction() as connection:
        connection.execute("UPDATE jobs SET state = 'running', owner = 'x|1|gone|y', lease_until = 0")
    until = time.monotonic() + PATIENCE_SECONDS
    while batch.store.job(job).state is not JobState.DONE and time.monotonic() < until:
        time.sleep(0.02)
    assert batch.states() == {JobState.DONE: 1}
    assert batch.store.job(job).crashes == 0


def test_progress_is_shown_while_a_job_runs(make_batch: MakeBatch, make_job: MakeJob, stages: Stages) -> None:
    batch, seen = make_batch(), threading.Event()

    def run(job: RunningJob) -> None:
        job.progress = ("sample", 3, 8)
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until and not seen.is_set():
            shown = batch.store.job(batch.id_of(job))
            if (shown.stage, shown.done, shown.total) == ("sample", 3, 8):
                seen.set()
            time.sleep(0.02)

    stages.run = run
    batch.run(make_job())
    assert seen.is_set()


# On a cluster only.


@pytest.mark.parametrize(("settings", "most"), [((2, None), 2), ((2, 3), 6), ((1, 3), 1)])
def test_a_worker_is_handed_as_many_jobs_as_its_batches_take(
    tmp_path: Path,
    fake_ray: FakeRay,
    make_job: MakeJob,
    settings: tuple[int, int | None],
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    max_in_flight, clips = settings
    batch, handed_out = Batch("ray", tmp_path, devices=1, max_in_flight=max_in_flight, clips_at_once=clips), list[int]()
    take_up = JobLifecycle.take_up

    def count(lifecycle: JobLifecycle, device: str, *args: object, **options: object) -> object:
        if device == "worker 0":
            handed_out.append(len(batch.engine.status()[0].jobs))
        return take_up(lifecycle, device, *args, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(JobLifecycle, "take_up", count)
    batch.run(*map(make_job, range(8)))
    assert max(handed_out) == most - 1
    batch.store.close()


def test_a_killed_worker_costs_an_attempt_and_is_restarted(
    tmp_path: Path, fake_ray: FakeRay, make_job: MakeJob, stages: Stages
) -> None:
    killed = threading.Event()

    def kill_once(job: RunningJob) -> None:
        if not killed.is_set():
            killed.set()
            threading.Thread(target=lambda: fake_ray.kill(fake_ray.actors[0], no_restart=False)).start()
            until_stopped(job)

    stages.run = kill_once
    batch = Batch("ray", tmp_path, devices=1)
    (job,) = batch.run(make_job())
    assert (batch.store.job(job).state, batch.store.job(job).attempts) == (JobState.DONE, 1)
    assert [event.device for event in batch.of(EventKind.DEVICE_LOST)] == ["worker 0"]
    assert "the worker was lost" in batch.of(EventKind.RETRY)[0].words
    batch.store.close()


def test_a_batch_ends_when_every_worker_is_lost_for_good(
    tmp_path: Path, fake_ray: FakeRay, make_job: MakeJob, stages: Stages
) -> None:
    def kill(job: RunningJob) -> None:
        threading.Thread(target=lambda: fake_ray.kill(fake_ray.actors[0])).start()
        until_stopped(job)

    stages.run = kill
    batch = Batch("ray", tmp_path, devices=1)
    with pytest.raises(Exception, match="every worker of the cluster is lost"):
        batch.run(make_job())
    assert batch.states() == {JobState.WAITING: 1}
    batch.store.close()


def test_a_worker_that_does_not_start_is_left_out(
    tmp_path: Path, fake_ray: FakeRay, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = BatchWorker.describe

    def fail_on_the_first(worker: BatchWorker) -> WorkerDescription:
        if worker is fake_ray.actors[0].instance:
            raise MemoryError
        return describe(worker)

    monkeypatch.setattr(BatchWorker, "describe", fail_on_the_first)
    batch = Batch("ray", tmp_path, devices=2)
    batch.run(make_job())
    assert batch.states() == {JobState.DONE: 1}
    batch.store.close()
