"""Batched sampling: which jobs share a batch, and that each ends as it would alone, whatever happens to the others."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from i2v_core.batch.execution.batching import BatchingPolicy, batch_key, plan_batch, predicted_gain
from i2v_core.batch.execution.ready_queue import ReadyQueue
from i2v_core.batch.execution.running_job import RunningJob
from i2v_core.batch.jobs.job import JobSpec, JobState
from i2v_core.batch.jobs.store import JobStore
from i2v_core.batch.monitoring.events import EventKind
from i2v_core.families import Conditioning, I2VModel
from i2v_core.memory.device import device_facts
from i2v_core.memory.device_memory import DeviceMemory
from i2v_core.planning.margin import needed_bytes
from i2v_core.planning.plan import Plan, Stage
from i2v_core.planning.planner import make_plan
from i2v_core.planning.request import Budget, Request
from i2v_core.planning.search import min_peak
from i2v_core.sampling.checkpoint import CheckpointWhen

from .conftest import EmulatedDevice, MakeJob, SharedCard
from .engines import ROOMY, Batch, MakeBatch, batches, pixels

pytestmark = pytest.mark.usefixtures("one_thread", "emulated")

STEPS, CLIPS = 4, 3
CPU = device_facts(torch.device("cpu"))
MakeEncodedJob = Callable[..., RunningJob]

# The policy.


def plan_for(model: I2VModel, spec: JobSpec, budget: float) -> Plan:
    """The job's plan within so many times the smallest budget that it fits."""
    request = Request(architecture=model.architecture, size=spec.size, precision="fp32")
    least_bytes = needed_bytes(min_peak(request, CPU), CPU)
    return make_plan(request, Budget(free_bytes=int(budget * least_bytes)), CPU)


def needed(plan: Plan) -> int:
    return needed_bytes(plan.prediction(Stage.SAMPLE), plan.device)


@pytest.fixture
def make_encoded(store: JobStore, make_job: MakeJob, tiny_model: I2VModel) -> MakeEncodedJob:
    """Makes encoded jobs, by default with a budget in which their weights stream."""

    def make(seed: int = 0, budget: float = 1.5, tokens: int = 5, **changes: object) -> RunningJob:
        spec = make_job(seed, **changes)
        (job,) = store.add([spec])
        inputs = {"text": torch.zeros(1, tokens, 4)}
        return RunningJob(
            record=store.job(job),
            model=tiny_model,
            plan=plan_for(tiny_model, spec, budget),
            output=Path("out"),
            latents_file=Path("latents"),
            conditioning=Conditioning(
                family="i2vgen-xl",
                size=spec.size,
                positive=inputs,
                negative=inputs,
                preview_factors=torch.zeros(5, 3),
            ),
        )

    return make


def batching_for(
    job: RunningJob, most: int | None = None, room: int = ROOMY, step_seconds: float = 1.0
) -> BatchingPolicy:
    """The policy of a device on which such a job has run alone."""
    policy = BatchingPolicy(lambda: DeviceMemory(free_bytes=room), most)
    policy.record_single(batch_key(job), [0.0, step_seconds, 2 * step_seconds])
    return policy


def test_where_weights_stream_it_pays_and_where_they_are_in_place_it_does_not(make_encoded: MakeEncodedJob) -> None:
    streamed, in_place = make_encoded(), make_encoded(budget=100)
    assert streamed.plan.sample.settings.streamed
    assert not in_place.plan.sample.settings.streamed
    pair, three = (plan_batch(streamed.plan, clips) for clips in (2, 3))
    assert pair is not None
    assert three is not None
    assert 0.02 < predicted_gain(streamed.plan, pair) < predicted_gain(streamed.plan, three)
    assert batching_for(streamed).expected_clips(streamed) >= 3
    assert batching_for(in_place).expected_clips(in_place) == 1
    assert batching_for(in_place, most=3).expected_clips(in_place) == 3  # as was asked for


def test_small_clips_share_their_launches(make_encoded: MakeEncodedJob) -> None:
    """Their steps take no longer than the kernel launches."""
    in_place = make_encoded(budget=100)
    assert batching_for(in_place, step_seconds=0.02).expected_clips(in_place) == 4
    assert batching_for(in_place, step_seconds=2.0).expected_clips(in_place) == 1


def test_as_many_as_are_ready_and_fit(make_encoded: MakeEncodedJob) -> None:
    job = make_encoded()
    clips = {ready: plan.request.clips for ready in range(1, 9) if (plan := batching_for(job).plan(job, ready))}
    assert {ready: clips[ready] for ready in (2, 3, 4, 8)} == {2: 2, 3: 3, 4: 4, 8: 4}
    pair = plan_batch(job.plan, 2)
    assert pair is not None
    full = batching_for(job, room=needed(pair)).plan(job, 4)
    assert full is not None
    assert full.request.clips == 2
    assert batching_for(job, room=needed(job.plan)).plan(job, 4) is None
    assert plan_batch(make_encoded(budget=1.0).plan, 3) is None


def test_a_batch_is_planned_within_the_budget_and_leaves_room_to_overlap(make_encoded: MakeEncodedJob) -> None:
    for budget in (1.0, 1.2, 1.5, 2, 3, 4, 8):
        single = make_encoded(budget=budget).plan
        others = max(needed_bytes(single.prediction(it), CPU) for it in (Stage.ENCODE, Stage.DECODE))
        for clips in (2, 3, 4):
            plan = plan_batch(single, clips)
            if plan is None:
                continue
            assert needed(plan) <= single.budget.usable_bytes
            if needed(single) + others <= single.budget.usable_bytes:
                assert needed(plan) + others <= single.budget.usable_bytes


def test_the_first_job_of_a_key_is_sampled_alone_and_shows_how_long_a_step_takes(make_encoded: MakeEncodedJob) -> None:
    job = make_encoded()
    policy = BatchingPolicy(lambda: DeviceMemory(free_bytes=ROOMY), None)
    assert policy.expected_clips(job) == 4
    assert policy.plan(job, 4) is None
    policy.record_single(batch_key(job), [5.0])  # a single step, which warms up
    assert policy.plan(job, 4) is None
    policy.record_single(batch_key(job), [5.0, 6.0, 7.0])
    assert policy.plan(job, 4) is not None


def test_what_steps_take_goes_before_what_is_predicted(make_encoded: MakeEncodedJob) -> None:
    job = make_encoded()
    policy, key = batching_for(job), batch_key(job)
    assert policy.pays(key, 4, 4.1)  # as it may be by chance
    assert policy.expected_clips(job) == 4
    assert not policy.pays(key, 4, 4.1)
    assert policy.expected_clips(job) == 3
    assert policy.pays(key, 3, 3.1)
    assert policy.pays(key, 3, 2.9)
    assert policy.pays(key, 3, 3.1)  # it is known to pay
    assert policy.expected_clips(job) == 3
    policy.record_out_of_memory(key, 3)
    assert policy.expected_clips(job) == 2
    assert policy.pays(key, 2, 1.9)
    assert policy.expected_clips(job) == 2


def test_only_jobs_that_can_share_every_call_have_the_same_key(make_encoded: MakeEncodedJob) -> None:
    key = batch_key(make_encoded())
    assert batch_key(make_encoded(seed=1, prompt="other words", cfg=7.0, priority=5.0)) == key
    for other in ({"steps": 3}, {"scheduler": "euler"}, {"cfg": 1.0}, {"precision": "bf16"}, {"tokens": 6}):
        assert batch_key(make_encoded(**other)) != key, other


# Batches that run.


@pytest.fixture
def make_batch(tmp_path: Path, tiny_model: I2VModel) -> Iterator[MakeBatch]:
    with batches(tmp_path, tiny_model) as make:
        yield make


@pytest.fixture
def specs(make_job: MakeJob) -> list[JobSpec]:
    """One job that is sampled alone, and three that are ready when it is done."""
    return [make_job(seed, format="png", steps=STEPS, cfg=3.0 + seed) for seed in range(1 + CLIPS)]


@pytest.fixture(scope="module")
def frames_alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: I2VModel) -> Callable[..., np.ndarray]:
    """The video that a job makes in a batch of its own."""
    made: dict[str, np.ndarray] = {}

    def frames(spec: JobSpec) -> np.ndarray:
        if spec.key not in made:
            with batches(tmp_path_factory.mktemp("alone"), tiny_model) as make:
                batch = make(max_in_flight=1)
                batch.run(spec)
                made[spec.key] = pixels(batch.output / spec.output_name)
        return made[spec.key]

    return frames


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> EmulatedDevice:
    """A device whose first sampling waits until all other jobs are ready, so that they share a batch."""
    came, ready = Counter[str](), threading.Event()
    whole = ReadyQueue.push

    def counted(ready_queue: ReadyQueue, job: RunningJob | None) -> None:
        whole(ready_queue, job)
        came["jobs"] += 1
        if came["jobs"] == 1 + CLIPS:
            ready.set()

    monkeypatch.setattr(ReadyQueue, "push", counted)

    def wait(stage: Stage, _: Plan) -> None:
        if stage is Stage.SAMPLE:
            assert ready.wait(60)

    return EmulatedDevice(card=SharedCard(ROOMY), before_stage=wait)


def step_takes(monkeypatch: pytest.MonkeyPatch, seconds: float, act: Callable[[], object] = lambda: None) -> list[int]:
    """Makes every step of a batch seem to take so long, whatever the machine; `act` is called before the first.

    Returns a list that receives the number of clips of each batch whose step time was looked at.
    """
    seen: list[int] = []
    whole = BatchingPolicy.pays
    acts = iter([act])

    def pays(policy: BatchingPolicy, key: object, clips: int, _: float) -> bool:
        seen.append(clips)
        next(acts, lambda: None)()
        return whole(policy, key, clips, seconds)

    monkeypatch.setattr(BatchingPolicy, "pays", pays)
    return seen


def notes(batch: Batch, job: int) -> str:
    report = batch.store.job(job).report
    assert report is not None
    return str(report["notes"])


def are_right(batch: Batch, specs: list[JobSpec], frames_alone: Callable[[JobSpec], np.ndarray]) -> bool:
    """Whether all frames are those of the jobs alone, up to rounding."""
    for spec in specs:
        made = pixels(batch.output / spec.output_name).astype(int)
        if np.abs(made - frames_alone(spec)).max() > 1:
            return False
    return True


def test_jobs_of_one_shape_are_sampled_together_and_each_is_as_it_is_alone(
    make_batch: MakeBatch,
    specs: list[JobSpec],
    device: EmulatedDevice,
    frames_alone: Callable[[JobSpec], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = step_takes(monkeypatch, 0.0)
    batch = make_batch(device, clips_at_once=CLIPS)
    alone, *together = batch.run(*specs)
    assert batch.states() == {JobState.DONE: 1 + CLIPS}
    assert seen == [CLIPS] * (STEPS - 1)
    assert "together" not in notes(batch, alone)
    assert all("sampled together with 2 others" in notes(batch, job) for job in together)
    assert are_right(batch, specs, frames_alone)
    spans = {(it.begun, it.ended) for it in batch.spans if it.stage == "sample" and it.job in together}
    assert len(spans) == 1
    for record in batch.store.jobs():
        assert record.report is not None
        assert [stage["stage"] for stage in record.report["stages"]] == ["encode", "sample", "decode"]
        assert record.measured_bytes is not None
        assert record.predicted_bytes is not None
        assert record.measured_bytes <= record.predicted_bytes


def test_on_a_card_of_the_budget_nothing_runs_out(
    make_batch: MakeBatch, specs: list[JobSpec], tiny_model: I2VModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights stream there, so that batches are made without being asked for; nothing is encoded beside sampling."""
    step_takes(monkeypatch, 0.0)
    device = EmulatedDevice(card=SharedCard(plan_for(tiny_model, specs[0], 1.5).budget.usable_bytes))
    batch = make_batch(device)
    _, *together = batch.run(*specs)
    assert batch.states() == {JobState.DONE: 1 + CLIPS}
    assert all("sampled together with 2 others" in notes(batch, job) for job in together)
    assert device.card.highest_bytes <= device.card.limit_bytes
    for record in batch.store.jobs():
        assert record.report is not None
        assert not any(stage["retries"] for stage in record.report["stages"])


def test_where_it_turns_out_not_to_pay_they_go_on_alone_from_that_step(
    make_batch: MakeBatch,
    specs: list[JobSpec],
    device: EmulatedDevice,
    frames_alone: Callable[[JobSpec], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = step_takes(monkeypatch, 1e6)
    batch = make_batch(device, clips_at_once=CLIPS)
    _, *together = batch.run(*specs)
    assert batch.states() == {JobState.DONE: 1 + CLIPS}
    assert seen == [CLIPS] * 2
    assert all("went on alone from step 3" in notes(batch, job) for job in together)
    assert are_right(batch, specs, frames_alone)


def test_one_that_is_cancelled_leaves_the_others_to_go_on(
    make_batch: MakeBatch,
    specs: list[JobSpec],
    device: EmulatedDevice,
    frames_alone: Callable[[JobSpec], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    survived: Counter[str],
) -> None:
    batch = make_batch(device, clips_at_once=CLIPS)
    ids = batch.store.add(specs)
    steps = step_takes(monkeypatch, 0.0, lambda: batch.engine.cancel(ids[2]))
    batch.run()
    assert steps == [CLIPS] * 2  # after its third step it has left, and what two of three take says nothing
    assert batch.states() == {JobState.DONE: CLIPS, JobState.CANCELLED: 1}
    over = [event.job for event in batch.events if event.kind in (EventKind.GIVEN_BACK, EventKind.DONE)]
    assert over.index(ids[2]) < min(over.index(ids[1]), over.index(ids[3]))
    assert batch.store.job(ids[2]).state is JobState.CANCELLED
    assert are_right(batch, [spec for spec in specs if spec is not specs[2]], frames_alone)
    survived["cancels in a batch"] += 1


def test_what_runs_out_of_memory_together_goes_on_alone(
    make_batch: MakeBatch,
    specs: list[JobSpec],
    device: EmulatedDevice,
    frames_alone: Callable[[JobSpec], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    survived: Counter[str],
) -> None:
    """After two steps another program takes memory that a batch needs, and a single clip does not."""
    batch = make_batch(device, clips_at_once=CLIPS)
    needs: list[int] = []
    before = device.before_stage

    def note(stage: Stage, plan: Plan) -> None:
        before(stage, plan)
        if stage is Stage.SAMPLE:
            needs.append(needed(plan))

    device.before_stage = note

    def take() -> None:
        device.card.limit_bytes = needs[0]

    step_takes(monkeypatch, 0.0, take)
    _, *together = batch.run(*specs)
    assert batch.states() == {JobState.DONE: 1 + CLIPS}
    assert needs[1] > needs[0]
    assert all("went on alone from step 2: " in notes(batch, job) for job in together)
    assert are_right(batch, specs, frames_alone)
    survived["out of memory in a batch"] += 1


def test_after_a_kill_each_goes_on_from_its_own_checkpoint(
    make_batch: MakeBatch,
    specs: list[JobSpec],
    device: EmulatedDevice,
    frames_alone: Callable[[JobSpec], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_model: I2VModel,
    survived: Counter[str],
) -> None:
    """Only what is on disk in the middle of a batch is left, and one of the checkpoints is lost as well."""
    batch = make_batch(device, clips_at_once=CLIPS, checkpoints=CheckpointWhen.EVERY_STEP)
    killed = tmp_path / "killed"
    killed.mkdir()

    def copy() -> None:
        if not (killed / "jobs.queue").exists():
            shutil.copytree(batch.engine.work, killed / "jobs.queue.work")
            with batch.store.database.reading() as connection:
                connection.execute("VACUUM INTO ?", (str(killed / "jobs.queue"),))

    step_takes(monkeypatch, 0.0, copy)
    batch.run(*specs)
    checkpoints = sorted((killed / "jobs.queue.work" / "checkpoints").iterdir())
    assert len(checkpoints) == CLIPS
    checkpoints[0].unlink()
    with batches(killed, tiny_model) as make:
        again = make(clips_at_once=CLIPS, checkpoints=CheckpointWhen.EVERY_STEP)
        with again.store.database.transaction() as connection:
            connection.execute("UPDATE jobs SET owner = 'x|1|gone|y', lease_until = 0 WHERE state = 'running'")
        again.run()
        assert again.states() == {JobState.DONE: 1 + CLIPS}
        reports = [str(job.report) for job in again.store.jobs()]
        assert sum("resumed from step 2 of 4" in report for report in reports) >= 1
        made = [spec for spec in specs if (again.output / spec.output_name).exists()]
        assert set(map(id, specs[1:])) <= set(map(id, made))
        assert are_right(again, specs[1:], frames_alone)
    survived["kills in a batch"] += 1


def test_an_engine_that_stops_gives_a_whole_batch_back(
    make_batch: MakeBatch, specs: list[JobSpec], device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(device, clips_at_once=CLIPS, checkpoints=CheckpointWhen.EVERY_STEP)
    step_takes(monkeypatch, 0.0, batch.engine.stop)
    batch.run(*specs)
    assert batch.states()[JobState.RUNNING] == 0
    assert batch.states()[JobState.WAITING] == CLIPS
    assert len(list((batch.engine.work / "checkpoints").iterdir())) == CLIPS


def test_two_engines_on_one_queue_never_run_a_job_twice(
    make_batch: MakeBatch, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_takes(monkeypatch, 0.0)
    both = [make_batch(clips_at_once=CLIPS) for _ in range(2)]
    both[0].store.add(make_job(seed, steps=3) for seed in range(12))
    for batch in both:
        batch.engine.start()
    for batch in both:
        assert batch.engine.join(120)
    assert both[0].states() == {JobState.DONE: 12}
    started = Counter(event.job for batch in both for event in batch.of(EventKind.STARTED))
    assert set(started.values()) == {1}


def test_one_after_another_none_are_put_together(
    make_batch: MakeBatch, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = step_takes(monkeypatch, 0.0)
    batch = make_batch(max_in_flight=1, clips_at_once=CLIPS)
    batch.run(*(make_job(seed, steps=3) for seed in range(4)))
    assert batch.states() == {JobState.DONE: 4}
    assert not seen
