"""The local engine: every job is done once, with the frames that it has when run alone, whatever happens to others."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from i2v_core import stages
from i2v_core.batch.devices.device import DeviceLostError
from i2v_core.batch.execution.model_cache import replicate
from i2v_core.batch.execution.stage_runner import StageRunner
from i2v_core.batch.jobs.job import JobSpec, JobState
from i2v_core.batch.jobs.leases import LeaseManager
from i2v_core.batch.monitoring.events import EventKind
from i2v_core.batch.monitoring.messages import waiting_texts
from i2v_core.errors import FileError
from i2v_core.families import I2VModel, VideoSize
from i2v_core.planning.margin import needed_bytes
from i2v_core.planning.plan import Plan, Stage
from i2v_core.sampling.checkpoint import CheckpointWhen
from i2v_core.units import MIB

from .conftest import EmulatedDevice, MakeJob, SharedCard
from .engines import ROOMY, Batch, MakeBatch, batches, pixels, when

pytestmark = [
    pytest.mark.usefixtures("one_thread", "emulated"),
    pytest.mark.slow,  # half a minute; test_lifecycle.py has the quick tests of engines
]


@pytest.fixture
def make_batch(tmp_path: Path, tiny_model: I2VModel) -> Iterator[MakeBatch]:
    with batches(tmp_path, tiny_model) as make:
        yield make


def test_videos_are_those_that_one_run_alone_makes(
    make_batch: MakeBatch, make_job: MakeJob, tiny_model: I2VModel, tmp_path: Path
) -> None:
    """Overlapped or one after another: equal to the bit, each with its report and its thumbnail."""
    specs = [make_job(seed, format="png", steps=2 + seed % 2) for seed in range(5)]
    batch = make_batch(clips_at_once=1)
    ids = batch.run(*specs)
    assert batch.states() == {JobState.DONE: 5}
    alone = Batch(tmp_path / "alone", tiny_model, EmulatedDevice(card=SharedCard(ROOMY)), max_in_flight=1)
    alone.run(*specs)
    for job_id, spec in zip(ids, specs, strict=True):
        job = batch.store.job(job_id)
        output = batch.output / spec.output_name
        assert job.output == output
        assert np.array_equal(pixels(output), pixels(alone.output / spec.output_name))
        assert job.report is not None
        assert [stage["stage"] for stage in job.report["stages"]] == ["encode", "sample", "decode"]
        assert job.measured_bytes is not None
        assert job.predicted_bytes is not None
        assert 0 < job.measured_bytes <= job.predicted_bytes
        assert job.thumbnail is not None
        assert job.thumbnail.is_file()
        assert job.seconds_left(0) == 0
    assert not list(batch.engine.work.glob("*.latent"))
    alone.store.close()


def test_stages_of_several_jobs_overlap_where_they_fit_together(make_batch: MakeBatch, make_job: MakeJob) -> None:
    """Decode of one job waits for sampling of the next to begin: if they did not overlap, the batch would never end."""
    at_once = threading.Barrier(2, timeout=30)
    seen: Counter[Stage] = Counter()

    def meet(stage: Stage, _: Plan) -> None:
        seen[stage] += 1
        if (stage is Stage.SAMPLE and seen[stage] == 2) or (stage is Stage.DECODE and seen[stage] == 1):
            at_once.wait()

    device = EmulatedDevice(card=SharedCard(ROOMY), before_stage=meet)
    batch = make_batch(device)
    batch.run(*map(make_job, range(4)))
    assert batch.states() == {JobState.DONE: 4}
    assert False in device.concluded_alone


def test_one_after_another_nothing_overlaps(make_batch: MakeBatch, make_job: MakeJob) -> None:
    card = SharedCard(ROOMY)
    batch = make_batch(EmulatedDevice(card=card), max_in_flight=1)
    batch.run(*map(make_job, range(3)))
    assert card.most_together == 1
    spans = sorted(batch.spans, key=lambda it: it.begun)
    assert all(before.ended <= after.begun for before, after in pairwise(spans))
    assert [span.stage for span in spans] == ["encode", "sample", "decode", "write"] * 3


def tight_bytes(tiny_model: I2VModel, spec: JobSpec) -> int:
    """Memory for one sampling stage, and for nothing beside it."""
    from i2v_core.memory.device import device_facts
    from i2v_core.planning.planner import make_plan
    from i2v_core.planning.request import Budget, Request

    request = Request(architecture=tiny_model.architecture, size=spec.size, precision="fp32")
    plan = make_plan(request, Budget(free_bytes=ROOMY), device_facts(torch.device("cpu")))
    return needed_bytes(plan.prediction(Stage.SAMPLE), plan.device)


def test_where_only_one_stage_fits_they_take_turns(
    make_batch: MakeBatch, make_job: MakeJob, tiny_model: I2VModel
) -> None:
    card = SharedCard(tight_bytes(tiny_model, make_job()))
    batch = make_batch(EmulatedDevice(card=card))
    batch.run(*map(make_job, range(5)))
    assert batch.states() == {JobState.DONE: 5}
    assert card.highest_bytes <= card.limit_bytes
    for job in batch.store.jobs():
        assert job.report is not None
        assert not any(stage["retries"] for stage in job.report["stages"])
    samplings = [span for span in batch.spans if span.stage == "sample"]
    others = [span for span in batch.spans if span.stage in ("encode", "decode")]
    assert not any(it.begun < other.ended and other.begun < it.ended for it in samplings for other in others)


def test_a_job_that_fails_is_set_aside_with_its_report_and_touches_no_other(
    make_batch: MakeBatch, make_job: MakeJob, survived: Counter[str]
) -> None:
    good = [make_job(seed) for seed in range(3)]
    missing = make_job(10, image=Path("gone.png"))
    huge = make_job(11, size=VideoSize(width_pixels=4096, height_pixels=4096, frames=64))
    batch = make_batch(attempts=2)
    *_, missing_id, huge_id = batch.run(*good, missing, huge)
    assert batch.states() == {JobState.DONE: 3, JobState.FAILED: 2}
    failed = batch.store.job(missing_id)
    assert (failed.attempts, "gone.png" in (failed.problem or "")) == (1, True)
    assert failed.report is not None
    assert "BadInputError" in failed.report["error"]
    refused = batch.store.job(huge_id)
    assert (refused.attempts, "does not fit" in (refused.problem or "")) == (1, True)
    survived["jobs that fail in a batch"] += 2


def test_a_picture_is_taken_as_the_camera_says_that_it_is(
    make_batch: MakeBatch, make_job: MakeJob, tmp_path: Path
) -> None:
    upright = Image.linear_gradient("L").resize((80, 64)).convert("RGB")
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    jobs = [
        make_job(0, image=tmp_path / name, image_digest=name, format="png") for name in ("upright.png", "turned.png")
    ]
    batch = make_batch()
    batch.run(*jobs)
    one, other = (pixels(batch.output / job.output_name) for job in jobs)
    assert np.array_equal(one, other)


def test_a_disk_that_is_full_for_a_while_costs_an_attempt(
    make_batch: MakeBatch, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latents are kept, so that only decode is done again."""
    full = iter([True, False])
    whole = stages.decode_stream

    def decode_stream(*args: object) -> object:
        if next(full):
            raise FileError("the disk is full", "free some")
        return whole(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr("i2v_core.batch.execution.stage_runner.stages.decode_stream", decode_stream)
    batch = make_batch()
    batch.run(make_job())
    assert [event.words for event in batch.of(EventKind.RETRY)] == ["the disk is full. Remedy: free some."]
    assert batch.states() == {JobState.DONE: 1}
    assert [span.stage for span in batch.spans] == ["encode", "sample", "decode", "decode", "write"]


def test_out_of_memory_is_retried_with_fallbacks(
    make_batch: MakeBatch, make_job: MakeJob, survived: Counter[str]
) -> None:
    card = SharedCard(ROOMY, fail_chance=0.0004, seed=3)
    batch = make_batch(EmulatedDevice(card=card))
    batch.run(*(make_job(seed, steps=3) for seed in range(6)))
    assert batch.states() == {JobState.DONE: 6}
    assert card.injected
    survived["out of memory in a batch"] += card.injected


@pytest.mark.parametrize("stage", ["encode", "sample", "decode"])
@pytest.mark.parametrize("by", ["the engine", "another process"])
def test_a_cancel_stops_its_job_within_a_chunk_and_no_other(
    make_batch: MakeBatch, make_job: MakeJob, stage: str, by: str, survived: Counter[str]
) -> None:
    batch = make_batch()

    def cancel(job: int) -> None:
        if by == "the engine":
            batch.engine.cancel(job)
        else:
            batch.store.cancel(job)
            batch.engine._lease_keeper.renew()  # pyright: ignore[reportPrivateUsage]

    when(batch, stage, cancel)
    batch.run(*map(make_job, range(3)))
    assert batch.states() == {JobState.DONE: 2, JobState.CANCELLED: 1}
    assert len(list(batch.output.glob("*.mp4"))) == 2
    survived["cancels in a batch"] += 1


def test_a_job_that_is_paused_goes_on_from_its_step(
    make_batch: MakeBatch, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(checkpoints=CheckpointWhen.EVERY_STEP, max_in_flight=1)
    first, second = batch.store.add([make_job(0, steps=8), make_job(1, steps=2)])
    reached = StageRunner._runtime  # pyright: ignore[reportPrivateUsage]

    def pause_at_three(self: StageRunner, job: object, stage: Stage) -> stages.Runtime:
        runtime = reached(self, job, stage)  # pyright: ignore[reportArgumentType]
        if stage is not Stage.SAMPLE or batch.store.job(first).stop_request or batch.of(EventKind.GIVEN_BACK):
            return runtime

        def progress(done: int, total: int, latents: torch.Tensor | None) -> None:
            runtime.on_progress(done, total, latents)
            if done == 3:
                batch.engine.pause_job(first)

        return replace(runtime, on_progress=progress)

    monkeypatch.setattr(StageRunner, "_runtime", pause_at_three)
    batch.run()
    assert batch.store.job(first).state is JobState.PAUSED
    assert batch.store.job(second).state is JobState.DONE
    batch.store.resume(first)
    again = make_batch(checkpoints=CheckpointWhen.EVERY_STEP)
    again.run()
    report = again.store.job(first).report
    assert report is not None
    assert "resumed from step 3 of 8" in str(report)


def test_while_the_queue_is_paused_nothing_is_begun(make_batch: MakeBatch, make_job: MakeJob) -> None:
    batch = make_batch(waits_for_more=True)
    batch.engine.pause()
    batch.store.add([make_job()])
    batch.engine.start()
    assert not batch.engine.join(0.3)
    assert not batch.events
    done = threading.Event()
    batch.on_event = lambda event: done.set() if event.kind is EventKind.DONE else None
    batch.engine.resume()
    assert done.wait(60)


def test_an_engine_that_stops_gives_its_jobs_back(make_batch: MakeBatch, make_job: MakeJob) -> None:
    batch = make_batch()
    when(batch, "sample", lambda _: batch.engine.stop())
    batch.run(*map(make_job, range(4)))
    states = batch.states()
    assert states[JobState.RUNNING] == 0
    assert states[JobState.WAITING] >= 2
    again = make_batch()
    again.run()
    assert again.states() == {JobState.DONE: 4}
    finished = {event.job for event in batch.of(EventKind.DONE)}
    assert not finished & {event.job for event in again.of(EventKind.STARTED)}


def test_a_video_that_was_whole_when_its_process_ended_is_not_made_again(
    make_batch: MakeBatch, make_job: MakeJob
) -> None:
    batch = make_batch()
    (job,) = batch.run(make_job())
    output = batch.store.job(job).output
    assert output is not None
    written = output.stat().st_mtime_ns
    with batch.store.database.transaction() as connection:
        connection.execute("UPDATE jobs SET state = 'running', owner = 'x|1|gone|y', lease_until = 0, report = NULL")
    again = make_batch()
    again.run()
    found = again.store.job(job)
    assert (found.state, found.output, output.stat().st_mtime_ns) == (JobState.DONE, output, written)
    assert found.report is not None
    assert [event.kind for event in again.events] == [EventKind.FOUND]


def test_jobs_start_in_the_order_of_the_policy(make_batch: MakeBatch, make_job: MakeJob) -> None:
    batch = make_batch(max_in_flight=1)
    priorities = [1.0, 5.0, 0.5, 9.0, 2.0]
    ids = batch.store.add([make_job(seed, priority=priority) for seed, priority in enumerate(priorities)])
    batch.store.pin([ids[2]])
    batch.run()
    assert [event.job for event in batch.of(EventKind.STARTED)] == [ids[at] for at in (2, 3, 1, 4, 0)]
    assert "position 1 by hand" in batch.of(EventKind.STARTED)[0].words
    assert "priority 9" in batch.of(EventKind.STARTED)[1].words


def test_jobs_go_to_every_card_and_each_to_one_that_it_fits(
    make_batch: MakeBatch, make_job: MakeJob, tiny_model: I2VModel
) -> None:
    small_bytes = tight_bytes(tiny_model, make_job())
    small = EmulatedDevice(card=SharedCard(small_bytes), name="small")
    large = EmulatedDevice(card=SharedCard(ROOMY), name="large")
    wide = VideoSize(width_pixels=256, height_pixels=256, frames=8)
    batch = make_batch(small, large)
    *_, wide_id = batch.run(*(make_job(seed, steps=1) for seed in range(8)), make_job(20, size=wide, steps=1))
    assert batch.states() == {JobState.DONE: 9}
    devices = Counter(job.device for job in batch.store.jobs())
    assert set(devices) == {"small", "large"}
    assert batch.store.job(wide_id).device == "large"
    assert small.card.highest_bytes <= small_bytes


def test_jobs_of_a_card_that_is_lost_move_on(make_batch: MakeBatch, make_job: MakeJob, survived: Counter[str]) -> None:
    def lose(stage: Stage, _: Plan) -> None:
        if stage is Stage.SAMPLE:
            raise DeviceLostError("it has fallen off the bus")

    broken = EmulatedDevice(card=SharedCard(ROOMY), name="broken", before_stage=lose)
    batch = make_batch(broken, EmulatedDevice(card=SharedCard(ROOMY), name="good"))
    batch.run(*map(make_job, range(6)))
    assert batch.states() == {JobState.DONE: 6}
    assert [event.device for event in batch.of(EventKind.DEVICE_LOST)] == ["broken"]
    assert {job.device for job in batch.store.jobs()} == {"good"}
    survived["lost cards"] += 1


def test_a_card_on_which_everything_fails_is_given_up(make_batch: MakeBatch, make_job: MakeJob) -> None:
    def fail(stage: Stage, _: Plan) -> None:
        if stage is Stage.ENCODE:
            raise RuntimeError("no kernel image is available")

    failing = EmulatedDevice(card=SharedCard(ROOMY), name="failing", before_stage=fail)
    batch = make_batch(failing, EmulatedDevice(card=SharedCard(ROOMY), name="good"), attempts=10)
    batch.run(*map(make_job, range(8)))
    assert batch.states() == {JobState.DONE: 8}
    assert [event.device for event in batch.of(EventKind.DEVICE_LOST)] == ["failing"]


def test_when_other_programs_take_memory_a_job_waits_and_then_makes_do(
    make_batch: MakeBatch, make_job: MakeJob, tiny_model: I2VModel
) -> None:
    spec = make_job()
    card = SharedCard(tight_bytes(tiny_model, spec))
    device = EmulatedDevice(card=card, others_bytes=card.limit_bytes // 3)
    batch = make_batch(device, memory_wait_seconds=0.3)
    (job,) = batch.run(spec)
    done = batch.store.job(job)
    assert done.state is JobState.DONE
    assert done.report is not None
    assert any("planned again for sample" in note for note in done.report["notes"])
    assert card.highest_bytes <= card.limit_bytes - device.others_bytes


def test_a_job_for_which_others_leave_too_little_is_tried_again_and_then_set_aside(
    make_batch: MakeBatch, make_job: MakeJob
) -> None:
    device = EmulatedDevice(card=SharedCard(ROOMY), others_bytes=ROOMY - 1024)
    batch = make_batch(device, memory_wait_seconds=0.1, attempts=2)
    (job,) = batch.run(make_job())
    failed = batch.store.job(job)
    assert (failed.state, failed.attempts) == (JobState.FAILED, 2)
    assert "which no plan fits" in (failed.problem or "")


def test_a_job_that_waits_for_other_programs_says_so_and_begins_when_they_are_gone(
    make_batch: MakeBatch, make_job: MakeJob
) -> None:
    device = EmulatedDevice(card=SharedCard(ROOMY), others_bytes=ROOMY - MIB // 2)
    batch = make_batch(device, memory_wait_seconds=600.0)
    batch.store.add([make_job()])
    batch.engine.start()
    waits: tuple[str, ...] = ()
    while not waits:
        assert not batch.engine.join(0.05)
        waits = waiting_texts(batch.engine.status()[0])
    assert waits == ("1 waiting job does not fit beside other programs, which hold 63.5 MiB",)
    assert not batch.events
    device.others_bytes = 0
    assert batch.engine.join(60)
    assert batch.states() == {JobState.DONE: 1}


def test_two_engines_on_one_queue_never_run_a_job_twice(
    make_batch: MakeBatch, make_job: MakeJob, survived: Counter[str]
) -> None:
    first, second = make_batch(), make_batch()
    first.store.add(map(make_job, range(10)))
    first.engine.start()
    second.engine.start()
    assert first.engine.join(120)
    assert second.engine.join(120)
    assert first.states() == {JobState.DONE: 10}
    started = [event.job for batch in (first, second) for event in batch.of(EventKind.STARTED)]
    assert sorted(it for it in started if it is not None) == sorted(job.id for job in first.store.jobs())


def test_a_job_that_was_taken_over_is_left_to_the_other(make_batch: MakeBatch, make_job: MakeJob) -> None:
    """After a long sleep of the machine, say, the lease is lost and another process has the job."""
    batch = make_batch()
    other = LeaseManager(batch.store)

    def take_over(job: int) -> None:
        with batch.store.database.transaction() as connection:
            connection.execute("UPDATE jobs SET owner = ? WHERE id = ?", (other.owner, job))
        batch.engine._lease_keeper.renew()  # pyright: ignore[reportPrivateUsage]
        other.finish(job, Path("elsewhere.mp4"), None, None)

    when(batch, "sample", take_over)
    (job,) = batch.run(make_job())
    assert batch.store.job(job).output == Path("elsewhere.mp4")
    assert [event.words for event in batch.of(EventKind.GIVEN_BACK)] == ["lost"]


def test_seconds_are_learned_and_predicted(make_batch: MakeBatch, make_job: MakeJob) -> None:
    batch = make_batch()
    first, *_ = batch.run(*map(make_job, range(3)))
    spec = make_job(7)
    again = make_batch()
    (job,) = again.run(spec)
    took = sum(stage["seconds"] for stage in (again.store.job(job).report or {})["stages"])
    predicted = again.store.job(job).predicted_seconds
    assert predicted is not None
    assert took / 5 < predicted < 5 * took
    assert predicted != again.store.job(first).predicted_seconds


def test_replicas_share_their_weights_and_nothing_else(tiny_model: I2VModel) -> None:
    other = replicate(tiny_model)
    for name, module in tiny_model.modules.items():
        mine, theirs = module.state_dict(), other.modules[name].state_dict()
        assert other.modules[name] is not module
        assert all(mine[key].data_ptr() == theirs[key].data_ptr() for key in mine)
    weight = next(other.modules["unet"].parameters())
    before = next(tiny_model.modules["unet"].parameters()).clone()
    weight.data = torch.zeros_like(weight)
    assert torch.equal(next(tiny_model.modules["unet"].parameters()), before)
