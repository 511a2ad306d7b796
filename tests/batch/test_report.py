"""The report of a batch as text."""

from __future__ import annotations

from pathlib import Path

from i2v_core.batch.jobs.job import JobState
from i2v_core.batch.jobs.job_file import BadRow
from i2v_core.batch.jobs.leases import LeaseManager
from i2v_core.batch.jobs.store import JobStore
from i2v_core.batch.monitoring.report import summary, table
from i2v_core.units import GIB

from .conftest import Clock, MakeSpec

BAD = BadRow(line=7, problem="there is no image", remedy="give image in every row")


def test_every_job_and_every_problem_is_in_it(store: JobStore, clock: Clock, make_spec: MakeSpec) -> None:
    done, found, failed, waiting = store.add(map(make_spec, range(4)))
    store.note_predictions([(done, 40.0, 3 * GIB)])
    leases = LeaseManager(store)
    for job in (done, found, failed):
        leases.claim(job, "a card")
    clock.now += 5
    leases.finish(done, Path("out/deep/a.mp4"), {"stages": [{"seconds": 1.25}, {"seconds": 2.0}]}, 2 * GIB)
    leases.finish(found, Path("elsewhere/b.mp4"), None, None)
    leases.fail(failed, "the disk is full", {}, attempts=1)
    records = store.jobs()
    assert summary(store.counts()) == "1 waiting, 2 done, 1 failed"
    assert summary(store.counts(), [BAD]) == "1 waiting, 2 done, 1 failed; 1 row cannot run"
    lines = table(records, [BAD], Path("out")).split("\n")
    assert [line.split() for line in lines[:5]] == [
        ["job", "picture", "size", "state", "seconds", "predicted", "measured", "video"],
        [str(done), "a.png", "64×64×2", "done", "3.2", "3.00", "GiB", "2.00", "GiB", "deep/a.mp4"],
        [str(found), "a.png", "64×64×2", "done", "5.0", "elsewhere/b.mp4"],
        [str(failed), "a.png", "64×64×2", "failed", "5.0"],
        [str(waiting), "a.png", "64×64×2", "waiting"],
    ]
    assert lines[5:] == [
        f"job {failed}: the disk is full",
        "line 7: there is no image. Remedy: give image in every row.",
    ]


def test_of_no_jobs_there_are_the_titles(tmp_path: Path) -> None:
    assert summary(dict.fromkeys(JobState, 0)) == "no jobs"
    assert table((), (), tmp_path).startswith("job")
