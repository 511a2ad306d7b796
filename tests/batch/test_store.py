"""The queue on disk: no job is lost and none is held twice, whatever ends, and a damaged file stops nothing."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from i2v_core.batch.jobs.job import JobState, StopRequest
from i2v_core.batch.jobs.leases import LEASE_SECONDS, MAX_CRASHES, LeaseManager
from i2v_core.batch.jobs.records import spec_of
from i2v_core.batch.jobs.store import JobStore
from i2v_core.errors import BadInputError, FileError

from .conftest import Clock, MakeSpec

ROOT = Path(__file__).parents[2]


def test_jobs_are_there_again_when_the_file_is_opened_again(store: JobStore, make_spec: MakeSpec) -> None:
    ids = store.add(map(make_spec, range(3)))
    again = JobStore(store.database.path)
    assert [job.spec for job in again.jobs()] == [make_spec(seed) for seed in range(3)]
    assert again.add(map(make_spec, range(4)))[:3] == ids
    assert again.counts()[JobState.WAITING] == 4
    again.close()


def test_a_job_has_one_owner(store: JobStore, make_spec: MakeSpec) -> None:
    (job,) = store.add([make_spec(0)])
    mine, others = LeaseManager(store), LeaseManager(store)
    claimed = mine.claim(job, "a card")
    assert claimed is not None
    assert (claimed.state, claimed.owner, claimed.device) == (JobState.RUNNING, mine.owner, "a card")
    assert others.claim(job, "a card") is None
    assert not others.finish(job, Path("x.mp4"), None, None)
    assert others.fail(job, "no", {}, attempts=1) is None
    assert not others.release(job)
    assert mine.finish(job, Path("x.mp4"), {"stages": []}, 5)
    done = store.job(job)
    assert (done.state, done.output, done.measured_bytes, done.owner) == (JobState.DONE, Path("x.mp4"), 5, None)
    assert mine.claim(job, "a card") is None


def test_many_claim_at_once_and_each_job_goes_to_one(tmp_path: Path, make_spec: MakeSpec) -> None:
    path = tmp_path / "jobs.queue"
    first = JobStore(path)
    ids = first.add(map(make_spec, range(40)))

    def take_all(_: int) -> list[int]:
        store = JobStore(path)
        leases = LeaseManager(store)
        taken = [job for job in ids if leases.claim(job, "cpu") is not None]
        store.close()
        return taken

    with ThreadPoolExecutor(4) as threads:
        taken = [job for jobs in threads.map(take_all, range(4)) for job in jobs]
    assert sorted(taken) == sorted(ids)
    first.close()


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_job_is_set_aside_with_its_report_after_its_attempts(
    store: JobStore, make_spec: MakeSpec, attempts: int
) -> None:
    (job,) = store.add([make_spec(0)])
    leases = LeaseManager(store)
    for attempt in range(1, attempts + 1):
        assert leases.claim(job, "cpu")
        state = leases.fail(job, "the disk is full", {"at": attempt}, attempts=attempts)
        assert state is (JobState.FAILED if attempt == attempts else JobState.WAITING)
    failed = store.job(job)
    assert (failed.attempts, failed.problem, failed.report) == (attempts, "the disk is full", {"at": attempts})
    assert leases.claim(job, "cpu") is None
    store.retry(job)
    assert store.job(job).attempts == 0
    assert leases.claim(job, "cpu")


def test_a_lease_that_is_renewed_is_kept_and_one_that_is_not_is_lost(
    store: JobStore, clock: Clock, make_spec: MakeSpec
) -> None:
    kept, lost = store.add(map(make_spec, range(2)))
    living, silent, next_one = LeaseManager(store), LeaseManager(store), LeaseManager(store)
    assert living.claim(kept, "cpu")
    assert silent.claim(lost, "cpu")
    clock.now += 0.9 * LEASE_SECONDS
    assert living.renew({kept: ("sample", 3, 20), lost: ("sample", 9, 20)}) == {kept: None}
    assert not next_one.reclaim_expired()
    clock.now += 0.2 * LEASE_SECONDS
    assert next_one.reclaim_expired() == (lost,)
    assert (store.job(kept).done, store.job(lost).done) == (3, 0)
    assert next_one.claim(lost, "cpu")
    assert silent.renew() == {}
    assert not silent.finish(lost, Path("late.mp4"), None, None)
    assert next_one.finish(lost, Path("good.mp4"), None, None)


def test_a_clock_that_was_set_back_loses_no_job(store: JobStore, clock: Clock, make_spec: MakeSpec) -> None:
    (job,) = store.add([make_spec(0)])
    assert LeaseManager(store).claim(job, "cpu")
    clock.now -= 1e8
    assert LeaseManager(store).reclaim_expired() == (job,)


def test_a_stop_request_reaches_the_owner_of_the_job(store: JobStore, make_spec: MakeSpec) -> None:
    paused, cancelled, crashed = store.add(map(make_spec, range(3)))
    leases = LeaseManager(store)
    for job in (paused, cancelled, crashed):
        assert leases.claim(job, "cpu")
    store.pause(paused)
    store.cancel(cancelled)
    store.cancel(crashed)
    assert leases.renew() == {paused: StopRequest.PAUSE, cancelled: StopRequest.CANCEL, crashed: StopRequest.CANCEL}
    leases.release(paused, JobState.PAUSED)
    leases.release(cancelled, JobState.CANCELLED)
    store.resume(paused)
    assert store.job(paused).state is JobState.WAITING
    assert store.job(cancelled).state is JobState.CANCELLED


def test_a_cancel_outlives_the_process_that_was_to_apply_it(store: JobStore, clock: Clock, make_spec: MakeSpec) -> None:
    (job,) = store.add([make_spec(0)])
    assert LeaseManager(store).claim(job, "cpu")
    store.cancel(job)
    clock.now += 2 * LEASE_SECONDS
    LeaseManager(store).reclaim_expired()
    assert store.job(job).state is JobState.CANCELLED


def test_a_job_that_ends_every_process_is_set_aside(store: JobStore, clock: Clock, make_spec: MakeSpec) -> None:
    (job,) = store.add([make_spec(0)])
    for _ in range(MAX_CRASHES):
        assert LeaseManager(store).claim(job, "cpu")
        clock.now += 2 * LEASE_SECONDS
        assert LeaseManager(store).reclaim_expired() == (job,)
    assert store.job(job).state is JobState.FAILED
    assert f"{MAX_CRASHES} times" in (store.job(job).problem or "")


def test_nothing_is_begun_while_the_queue_is_paused(store: JobStore, make_spec: MakeSpec) -> None:
    (job,) = store.add([make_spec(0)])
    store.set_paused(True)
    assert LeaseManager(store).claim(job, "cpu") is None
    store.set_paused(False)
    assert LeaseManager(store).claim(job, "cpu")


def test_records_are_read_by_id_by_state_and_by_their_last_start(
    store: JobStore, clock: Clock, make_spec: MakeSpec
) -> None:
    ids = store.add(map(make_spec, range(4)))
    assert store.last_started() is None
    leases = LeaseManager(store)
    for job, device in zip(ids, ("a", "b", "a"), strict=False):
        clock.now += 1
        leases.claim(job, device)
    started = [store.last_started(), store.last_started("b"), store.last_started("c")]
    assert [job and job.id for job in started] == [ids[2], ids[1], None]
    assert [job.id for job in store.records([ids[3], 99, ids[0]])] == [ids[3], ids[0]]
    assert [job.id for job in store.latest(JobState.RUNNING, 2)] == [ids[2], ids[1]]
    (queued,) = store.queued()
    assert (queued.id, spec_of(queued.spec_json), queued.predicted_seconds) == (ids[3], make_spec(3), None)


def test_steering_what_cannot_be_is_refused(store: JobStore, make_spec: MakeSpec) -> None:
    (job,) = store.add([make_spec(0)])
    for move in (store.resume, store.retry):
        with pytest.raises(BadInputError, match="is waiting and cannot be"):
            move(job)
    with pytest.raises(BadInputError, match="priority"):
        store.set_priority(job, float("nan"))
    for unknown in (store.cancel, store.job, lambda it: store.pin([it]), lambda it: store.set_priority(it, 2)):
        with pytest.raises(BadInputError, match="no job 99"):
            unknown(99)
    store.set_priority(job, 3)
    assert store.job(job).spec.priority == 3
    store.pin([job])
    assert store.job(job).position == 0


def test_seconds_are_learned_first_from_the_same_shape(store: JobStore) -> None:
    assert store.seconds_per_unit("m", "a", "sample") is None
    for seconds in (1.0, 2.0, 30.0):
        store.learn("m", "a", "sample", work=2.0, seconds=seconds)
    assert store.seconds_per_unit("m", "a", "sample") == 1.0
    assert store.seconds_per_unit("m", "b", "sample") == 1.0
    assert store.seconds_per_unit("m", "a", "decode") is None
    for _ in range(30):
        store.learn("m", "b", "sample", work=1.0, seconds=9.0)
    assert store.seconds_per_unit("m", "b", "sample") == 9.0
    assert store.seconds_per_unit("m", "a", "sample") == 1.0


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_damaged_file_is_set_aside_and_a_new_queue_begins(
    tmp_path: Path, make_spec: MakeSpec, keep: float, caplog: pytest.LogCaptureFixture, survived: Counter[str]
) -> None:
    path = tmp_path / "jobs.queue"
    store = JobStore(path)
    store.add(map(make_spec, range(200)))
    store.close()
    content = bytearray(path.read_bytes())
    for at in range(int(keep * len(content)), len(content), 7):
        content[at] ^= 0xFF
    path.write_bytes(content)
    path.with_name(path.name + "-wal").write_bytes(b"left over")
    again = JobStore(path)
    assert again.counts()[JobState.WAITING] == 0
    again.add([make_spec(0)])
    assert "set aside" in caplog.text
    assert (tmp_path / "jobs.broken").read_bytes() == content
    again.close()
    survived["damaged queues"] += 1


def test_a_file_that_is_no_database_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "jobs.queue"
    path.write_bytes(b"no database, but long enough to be taken for one" * 30)
    JobStore(path).close()
    assert (tmp_path / "jobs.broken").exists()


def test_other_databases_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "photos.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE photos (name TEXT)")
    other.close()
    with pytest.raises(FileError, match="another program"):
        JobStore(path)
    JobStore(tmp_path / "jobs.queue").close()
    with sqlite3.connect(tmp_path / "jobs.queue") as later:
        later.execute("PRAGMA user_version = 99")
    later.close()
    with pytest.raises(FileError, match="version 99"):
        JobStore(tmp_path / "jobs.queue")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError):
        JobStore(tmp_path / "folder")


KILLED = """
import sys
from dataclasses import replace
from pathlib import Path
from i2v_core.batch.jobs.job import JobSpec
from i2v_core.batch.jobs.leases import LeaseManager
from i2v_core.batch.jobs.store import JobStore
from i2v_core.families import VideoSize

store = JobStore(Path(sys.argv[1]))
spec = JobSpec(model=Path("m"), image=Path("a.png"), prompt="x", steps=2, cfg=4.0, fps=8.0,
               size=VideoSize(width_pixels=64, height_pixels=64, frames=2))
leases = LeaseManager(store)
for seed in range(10_000):
    (job,) = store.add([replace(spec, seed=seed)])
    print("added", seed, flush=True)
    leases.claim(job, "cpu")
    if seed % 2:
        leases.finish(job, Path("x.mp4"), None, None)
        print("finished", seed, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no kill -9")
@pytest.mark.parametrize("after", [3, 40])
def test_a_kill_loses_nothing_that_was_said(tmp_path: Path, after: int, survived: Counter[str]) -> None:
    """A killed process loses nothing that it was told; and what it held is free at once."""
    path = tmp_path / "jobs.queue"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline().split() for _ in range(after)]
    process.send_signal(signal.SIGKILL)
    said += [line.split() for line in process.stdout]
    process.wait()
    store = JobStore(path)
    states = {job.spec.seed: job.state for job in store.jobs()}
    assert {int(seed) for word, seed in said if word == "added"} <= set(states)
    assert all(states[int(seed)] is JobState.DONE for word, seed in said if word == "finished")
    LeaseManager(store).reclaim_expired()
    assert store.counts()[JobState.RUNNING] == 0
    assert store.counts()[JobState.WAITING] > 0
    store.close()
    survived["kills"] += 1


ACTIONS: dict[str, Callable[[LeaseManager, JobStore, int], object]] = {
    "claim": lambda owner, _, job: owner.claim(job, "cpu"),
    "fail": lambda owner, _, job: owner.fail(job, "no", {}, attempts=2),
    "give back": lambda owner, _, job: owner.release(job),
    "cancel": lambda _, store, job: store.cancel(job),
    "pause": lambda _, store, job: store.pause(job),
    "resume": lambda _, store, job: store.resume(job),
    "retry": lambda _, store, job: store.retry(job),
}
MOVES = ["finish", "expire", *ACTIONS]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 2), st.integers(0, 1)), max_size=40))
def test_whatever_happens_a_job_is_in_one_state_and_finished_once(
    tmp_path_factory: pytest.TempPathFactory, make_spec: MakeSpec, moves: list[tuple[str, int, int]]
) -> None:
    clock = Clock()
    store = JobStore(tmp_path_factory.mktemp("queue") / "jobs.queue", clock)
    ids = store.add(map(make_spec, range(3)))
    leases = [LeaseManager(store), LeaseManager(store)]
    finished: Counter[int] = Counter()
    for move, which, who in moves:
        job, owner = ids[which], leases[who]
        if move == "finish":
            finished[job] += owner.finish(job, Path("x.mp4"), None, None)
        elif move == "expire":
            clock.now += 2 * LEASE_SECONDS
            owner.renew()
            owner.reclaim_expired()
        else:
            if move == "retry":  # which may be of one that is done
                finished[job] = 0
            with suppress(BadInputError):
                ACTIONS[move](owner, store, job)
        for record in store.jobs():
            assert (record.state is JobState.RUNNING) == (record.owner is not None)
    assert sum(store.counts().values()) == 3
    assert all(count == 1 for count in finished.values() if count)
    assert all(store.job(job).state is JobState.DONE for job, count in finished.items() if count)
    store.close()


def test_threads_share_a_store(store: JobStore, make_spec: MakeSpec) -> None:
    barrier = threading.Barrier(4)

    def work(first: int) -> None:
        barrier.wait()
        leases = LeaseManager(store)
        for job in store.add(map(make_spec, range(first, first + 10))):
            assert leases.claim(job, "cpu")
            assert leases.finish(job, Path("x.mp4"), None, None)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, (0, 10, 20, 30)))
    assert store.counts()[JobState.DONE] == 40


def test_only_the_package_of_jobs_has_sql() -> None:
    """Everything else asks the store by methods with names."""
    statement = re.compile(r"\b(SELECT|UPDATE|INSERT INTO|DELETE FROM|CREATE TABLE|PRAGMA)\b|\bsqlite3\b")
    files = [
        file
        for folder in ("i2v_core", "nodes")
        for file in (ROOT / folder).rglob("*.py")
        if (ROOT / "i2v_core" / "batch" / "jobs") not in file.parents
    ]
    assert len(files) > 100
    found = {file.relative_to(ROOT): statement.findall(file.read_text("utf-8")) for file in files}
    assert {file: statements for file, statements in found.items() if statements} == {}
    assert "sqlite3" not in (ROOT / "i2v_core" / "batch" / "jobs" / "job.py").read_text("utf-8")
