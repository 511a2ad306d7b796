"""200 jobs unattended: random sizes and priorities, bad rows, injected out-of-memory, cancels, a kill and a restart."""

from __future__ import annotations

import csv
import math
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from i2v_core.batch.engines.local import LocalEngine
from i2v_core.batch.engines.settings import EngineSettings
from i2v_core.batch.jobs.job import JobRecord, JobSpec, JobState
from i2v_core.batch.jobs.job_file import JobList, read_job_list
from i2v_core.batch.jobs.store import JobStore
from i2v_core.batch.monitoring.events import Event, EventKind
from i2v_core.batch.scheduling.estimator import plan_key
from i2v_core.batch.scheduling.policy import AGEING_SECONDS, LOADED_FACTOR
from i2v_core.families import I2VModel, VideoSize, family_of, load_model, read_architecture
from i2v_core.units import GIB, MIB

from .conftest import EmulatedDevice, SharedCard, on_shared_card

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "emulated")]

ROOT = Path(__file__).parents[2]
GOOD, BAD, DOOMED = 200, 10, 3
CARD_BYTES = 6 * MIB
"""All three stages of most jobs fit at the same time; the largest only fit chunked."""

BAD_ROWS = (
    {"image": "nowhere.png"},
    {"size": "65x64"},
    {"frames": "-3"},
    {"steps": "nan"},
    {"seed": "-1"},
    {"priority": "0"},
    {"prompt": ""},
    {"size": "tall"},
    {"steps": "1001"},
    {"image": "jobs.csv"},
)


def write_list(folder: Path, pictures: Path) -> Path:
    """Writes the list. The doomed rows are valid when it is read; then their picture is deleted."""
    rng = random.Random(8)
    rows = [
        {
            "image": str(pictures / f"{rng.randrange(3)}.png"),
            "prompt": rng.choice(("a red circle", "a blue square moves left")),
            "seed": str(seed),
            "size": f"{rng.choice((64, 72))}x64",
            "frames": str(rng.randint(1, 2)),
            "steps": str(rng.randint(1, 2)),
            "priority": f"{rng.choice((0.5, 1, 1, 2, 10))}",
        }
        for seed in range(GOOD)
    ]
    doomed = folder / "doomed.png"
    doomed.write_bytes((pictures / "0.png").read_bytes())
    rows += [{**rows[0], "image": str(doomed), "seed": str(1000 + index)} for index in range(DOOMED)]
    rows += [{**rows[0], "seed": str(2000 + index), **bad} for index, bad in enumerate(BAD_ROWS)]
    rng.shuffle(rows)
    path = folder / "jobs.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_list(path: Path, model: Path) -> JobList:
    defaults = JobSpec(
        model=model,
        image=Path(),
        prompt="",
        size=VideoSize(width_pixels=64, height_pixels=64, frames=1),
        steps=1,
        cfg=4.0,
        fps=8.0,
        precision="fp32",
        quality=40,
    )
    return read_job_list(path, defaults, family_of(read_architecture(model)).facts)


def engine_on(store: JobStore, output: Path, card: SharedCard, model: I2VModel, on_event: object) -> LocalEngine:
    settings = EngineSettings(output=output, attempts=2, retry_seconds=0.0, renew_seconds=0.1)
    device = EmulatedDevice(card=card)
    return LocalEngine(store, [device], settings, load=lambda _: model, on_event=on_event)  # pyright: ignore[reportArgumentType]


def until_killed(folder: Path, model_folder: Path) -> None:
    """Runs the queue in the process that is to be killed; prints every job that is done."""
    import torch

    torch.set_num_threads(1)
    store = JobStore(folder / "jobs.queue")

    def on_event(event: Event) -> None:
        if event.kind is EventKind.DONE:
            sys.stdout.write(f"done {event.job}\n")
            sys.stdout.flush()

    with on_shared_card():
        engine_on(store, folder / "out", SharedCard(CARD_BYTES), load_model(model_folder), on_event).run()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no kill -9")
def test_every_good_job_is_done_once_and_every_bad_one_reported(
    tmp_path: Path, pictures: Path, tiny_folder: Path, tiny_model: I2VModel, survived: Counter[str]
) -> None:
    found = read_list(write_list(tmp_path, pictures), tiny_folder)
    (tmp_path / "doomed.png").unlink()
    assert len(found.jobs) == GOOD + DOOMED
    assert len(found.bad) == BAD
    assert all(bad.problem and bad.remedy for bad in found.bad)
    store = JobStore(tmp_path / "jobs.queue")
    ids = store.add(job.spec for job in found.jobs)

    killed_with = kill_after(tmp_path, tiny_folder, done=25)
    done_before = {job.id: job for job in store.jobs(JobState.DONE)}
    assert killed_with <= set(done_before)
    written = {it.output: it.output.stat().st_mtime_ns for it in done_before.values() if it.output}
    held = [job.id for job in store.jobs(JobState.RUNNING)]
    assert held

    waiting = [job.id for job in store.jobs(JobState.WAITING) if "doomed" not in job.spec.image.name]
    store.cancel(waiting[0])
    card = SharedCard(CARD_BYTES, fail_chance=0.00002, seed=1)
    checker = EventChecker(store, cancel=waiting[1])
    engine = engine_on(store, tmp_path / "out", card, tiny_model, checker.on_event)
    checker.engine = engine
    engine.start()
    assert engine.join(600)

    states = Counter(job.state for job in store.jobs())
    assert states == {JobState.DONE: GOOD - 2, JobState.CANCELLED: 2, JobState.FAILED: DOOMED}
    assert checker.done == Counter(set(ids) - set(done_before) - set(waiting[:2]) - checker.failed - checker.found)
    for job in store.jobs(JobState.FAILED):
        assert "doomed.png" in (job.problem or "")
        assert job.report is not None
    outputs = {job.output for job in store.jobs(JobState.DONE)}
    assert {path for path in (tmp_path / "out").iterdir() if path.suffix == ".mp4"} == outputs
    assert all(output.stat().st_mtime_ns == at for output, at in written.items())
    assert not checker.out_of_order
    assert card.injected
    assert card.highest_bytes <= CARD_BYTES
    store.close()
    survived["kills of a batch"] += 1
    survived["out of memory in a batch"] += card.injected
    survived["bad rows"] += BAD


def kill_after(folder: Path, model_folder: Path, done: int) -> set[int]:
    """Runs the queue in another process, and kills it in the middle; the jobs that it said were done."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.batch.test_overnight import until_killed
until_killed(Path({str(folder)!r}), Path({str(model_folder)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(done)]
    process.send_signal(signal.SIGKILL)
    said += process.stdout.readlines()
    process.wait()
    return {int(line.split()[1]) for line in said if line.startswith("done")}


class EventChecker:
    """Records how jobs end, and whether each job that starts has the highest score of those that wait."""

    def __init__(self, store: JobStore, cancel: int) -> None:
        self.engine: LocalEngine | None = None
        self.done: Counter[int] = Counter()
        self.found: set[int] = set()
        self.failed: set[int] = set()
        self.out_of_order: list[str] = []
        self._store, self._cancel = store, cancel
        self._loaded: tuple[str | None, str | None] = (None, None)

    def on_event(self, event: Event) -> None:
        if event.job is None:
            return
        if event.kind is EventKind.STARTED:
            self._check_order(self._store.job(event.job))
        if event.kind is EventKind.STAGE and event.words == "sample" and event.job == self._cancel:
            assert self.engine is not None
            self.engine.cancel(event.job)
        self.done[event.job] += event.kind is EventKind.DONE
        self.done += Counter()  # drops those of zero
        if event.kind is EventKind.FOUND:
            self.found.add(event.job)
        if event.kind is EventKind.FAILED:
            self.failed.add(event.job)

    def _check_order(self, job: JobRecord) -> None:
        waiting = [it for it in self._store.jobs(JobState.WAITING) if it.attempts == 0]
        # The scheduler may have chosen before the job that started last had loaded its plan.
        orders = [{it.id: self._score(it, loaded) for it in [*waiting, job]} for loaded in self._loaded]
        behind = [scores for scores in orders if scores[job.id] < max(scores.values()) - 1e-9]
        if job.attempts == 0 and len(behind) == len(orders):
            self.out_of_order.append(f"job {job.id} has {behind[0][job.id]}, another {max(behind[0].values())}")
        self._loaded = (self._loaded[-1], plan_key(job.spec))

    def _score(self, job: JobRecord, loaded_plan: str | None) -> float:
        """The policy's formula once more: seconds ÷ GiB × priority, doubled every `AGEING_SECONDS`, as a power of 2."""
        assert job.predicted_seconds is not None
        assert job.predicted_bytes is not None
        weight = job.predicted_seconds / (job.predicted_bytes / GIB) * job.spec.priority
        loaded = LOADED_FACTOR if plan_key(job.spec) == loaded_plan else 1.0
        return math.log2(weight * loaded) - job.added_at / AGEING_SECONDS
