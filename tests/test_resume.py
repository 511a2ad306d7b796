"""A video that was cancelled, or whose program ended, resumes from its checkpoint if that is valid."""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from i2v_core import stages
from i2v_core.errors import RanOutError
from i2v_core.families import FAMILIES, Conditioning, I2VModel, Prompt, VideoSize, load_model
from i2v_core.memory.device import device_facts
from i2v_core.planning.plan import Plan
from i2v_core.planning.planner import make_plan
from i2v_core.planning.predict import with_settings
from i2v_core.planning.request import Budget, Request
from i2v_core.sampling import checkpoint
from i2v_core.sampling.checkpoint import Checkpointing, CheckpointWhen
from i2v_core.units import GIB
from tests.emulated_cuda import CARD, emulated_cuda
from tests.marking import first_quick

CPU = torch.device("cpu")
RUNTIME = stages.Runtime(device=CPU)
SETTINGS = stages.SamplerSettings(steps=6, cfg=4.0, seed=2, scheduler="unipc")
PROMPT = Prompt(
    image_FHWC=torch.rand(1, 70, 90, 3, generator=torch.Generator().manual_seed(0)),
    text="a red circle",
    negative_text="blue",
    fps=8,
)

pytestmark = pytest.mark.usefixtures("one_thread")


SCHEDULERS = [choice.name for choice in FAMILIES["i2vgen-xl"].facts.schedulers]


class StopError(Exception):
    """Raised by the caller to cancel."""


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> I2VModel:
    return load_model(tiny_folder)


@pytest.fixture(scope="module")
def plan(model: I2VModel) -> Plan:
    size = VideoSize(width_pixels=72, height_pixels=64, frames=4)
    request = Request(architecture=model.architecture, size=size, precision="fp32")
    return make_plan(request, Budget(free_bytes=GIB), device_facts(CPU))


@pytest.fixture(scope="module")
def conditioning(model: I2VModel, plan: Plan) -> Conditioning:
    return stages.encode(model, plan, PROMPT, RUNTIME)[0]


@pytest.fixture(scope="module")
def undisturbed(model: I2VModel, plan: Plan, conditioning: Conditioning) -> Callable[[str], Tensor]:
    """The samples of a run that nothing stops, by its scheduler."""

    @cache
    def samples(scheduler: str) -> Tensor:
        return stages.sample(model, plan, conditioning, replace(SETTINGS, scheduler=scheduler), RUNTIME)[0]

    return samples


@pytest.fixture
def every_step(tmp_path: Path) -> Checkpointing:
    return Checkpointing(folder=tmp_path / "checkpoints", when=CheckpointWhen.EVERY_STEP)


def stop_after(step: int) -> stages.Runtime:
    """Return a runtime that cancels in the middle of the step after `step`."""
    done, calls = 0, 0

    def progress(at: int, *_: object) -> None:
        nonlocal done
        done = at

    def check() -> None:
        nonlocal calls
        calls += done == step
        if calls > 3:
            raise StopError

    return replace(RUNTIME, on_progress=progress, check_cancelled=check)


def steps_seen(runtime: stages.Runtime, seen: list[int]) -> stages.Runtime:
    return replace(runtime, on_progress=lambda done, *_: seen.append(done))


def cancelled(
    model: I2VModel,
    plan: Plan,
    conditioning: Conditioning,
    settings: stages.SamplerSettings,
    at: int,
    chosen: Checkpointing,
) -> Path | None:
    """Run up to a step, cancel, and return the checkpoint file that is left."""
    with pytest.raises(StopError):
        stages.sample(model, plan, conditioning, settings, stop_after(at), chosen)
    return next(iter(chosen.folder.glob("*")), None)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("goes_on", [CARD, CPU], ids=["on the card", "on the CPU"])
def test_a_run_that_was_cancelled_on_a_card_resumes(
    model: I2VModel,
    plan: Plan,
    conditioning: Conditioning,
    every_step: Checkpointing,
    scheduler: str,
    goes_on: torch.device,
    undisturbed: Callable[[str], Tensor],
) -> None:
    settings = replace(SETTINGS, scheduler=scheduler)
    expected = undisturbed(scheduler)
    with emulated_cuda() as card:
        with pytest.raises(StopError):
            stages.sample(model, plan, conditioning, settings, replace(stop_after(3), device=CARD), every_step)
        runtime = replace(RUNTIME, device=goes_on)
        found, report = stages.sample(model, plan, conditioning, settings, runtime, every_step)
    assert torch.equal(found, expected)
    assert "resumed" in " ".join(report.notes)
    assert not card.races, card.races[0]


@pytest.mark.parametrize("scheduler", first_quick(SCHEDULERS))
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_cancelled_run_resumes_with_the_same_result(
    model: I2VModel,
    plan: Plan,
    conditioning: Conditioning,
    every_step: Checkpointing,
    scheduler: str,
    at: int,
    survived: Counter[str],
    undisturbed: Callable[[str], Tensor],
) -> None:
    settings = replace(SETTINGS, scheduler=scheduler)
    expected = undisturbed(scheduler)
    assert cancelled(model, plan, conditioning, settings, at, every_step)
    seen: list[int] = []
    samples, report = stages.sample(model, plan, conditioning, settings, steps_seen(RUNTIME, seen), every_step)
    assert torch.equal(samples, expected)
    survived["cancels"] += 1
    assert seen == list(range(at + 1, 7))
    assert report.notes == (f"resumed from step {at} of 6, saved by an earlier run",)
    assert not list(every_step.folder.iterdir())  # done, so there is nothing to keep


def test_another_plan_may_resume(
    model: I2VModel, plan: Plan, conditioning: Conditioning, every_step: Checkpointing
) -> None:
    """Include plans with other chunking and streaming."""
    expected, _ = stages.sample(model, plan, conditioning, SETTINGS, RUNTIME)
    assert cancelled(model, plan, conditioning, SETTINGS, 3, every_step)
    sample = replace(plan.sample.settings, streamed=True, batched_guidance=False, workspace_bytes=65536)
    other = with_settings(plan, sample=sample)
    samples, report = stages.sample(model, other, conditioning, SETTINGS, RUNTIME, every_step)
    assert report.notes
    assert torch.allclose(samples, expected, atol=2e-5)


Change = Callable[[stages.SamplerSettings, Conditioning], tuple[stages.SamplerSettings, Conditioning]]


def changed_positive(conditioning: Conditioning) -> Conditioning:
    name, tensor = next(iter(conditioning.positive.items()))
    return replace(conditioning, positive={**conditioning.positive, name: tensor + 1e-3})


@pytest.mark.parametrize(
    "change",
    [
        lambda settings, conditioning: (replace(settings, seed=3), conditioning),
        lambda settings, conditioning: (replace(settings, cfg=4.5), conditioning),
        lambda settings, conditioning: (replace(settings, scheduler="ddim"), conditioning),
        lambda settings, conditioning: (replace(settings, steps=7), conditioning),
        lambda settings, conditioning: (settings, changed_positive(conditioning)),
    ],
    ids=["seed", "cfg", "scheduler", "steps", "conditioning"],
)
def test_another_video_does_not_resume_from_it(
    model: I2VModel, plan: Plan, conditioning: Conditioning, every_step: Checkpointing, change: Change
) -> None:
    kept = cancelled(model, plan, conditioning, SETTINGS, 3, every_step)
    settings, conditioning = change(SETTINGS, conditioning)
    _, report = stages.sample(model, plan, conditioning, settings, RUNTIME, every_step)
    assert not report.notes
    assert kept is not None
    assert kept.exists()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def claim_a_huge_header(file: Path) -> None:
    file.write_bytes((2**63).to_bytes(8, "little") + b"{}")


def take_another_key(file: Path) -> None:
    rewrite(file, lambda header, _: header.update(key="other"))


def take_another_step(file: Path) -> None:
    rewrite(file, lambda header, _: header.update(steps_done=99))


def take_no_step(file: Path) -> None:
    rewrite(file, lambda header, _: header.update(steps_done="many"))


def spoil_latents(file: Path) -> None:
    rewrite(file, lambda _, tensors: tensors["latents"].fill_(float("nan")))


def shrink_latents(file: Path) -> None:
    rewrite(file, lambda _, tensors: tensors.update(latents=tensors["latents"][..., :2].clone()))


def lose_a_tensor(file: Path) -> None:
    rewrite(file, lambda _, tensors: tensors.pop(next(name for name in tensors if name != "latents")))


def rewrite(file: Path, change: Callable[[dict[str, object], dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load(file.read_bytes())
    length = int.from_bytes(file.read_bytes()[:8], "little")
    metadata = json.loads(file.read_bytes()[8 : 8 + length])["__metadata__"]
    header = json.loads(metadata["i2v_checkpoint"])
    change(header, tensors)
    file.write_bytes(safetensors.torch.save(tensors, {"i2v_checkpoint": json.dumps(header)}))


@pytest.mark.parametrize(
    "damage",
    first_quick(
        [
            truncate,
            empty,
            claim_a_huge_header,
            take_another_key,
            take_another_step,
            take_no_step,
            spoil_latents,
            shrink_latents,
            lose_a_tensor,
        ],
        quick=3,
    ),
)
def test_a_damaged_checkpoint_is_set_aside(
    model: I2VModel,
    plan: Plan,
    conditioning: Conditioning,
    every_step: Checkpointing,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
    survived: Counter[str],
    undisturbed: Callable[[str], Tensor],
) -> None:
    expected = undisturbed("unipc")
    kept = cancelled(model, plan, conditioning, SETTINGS, 3, every_step)
    assert kept is not None
    damage(kept)
    samples, report = stages.sample(model, plan, conditioning, SETTINGS, RUNTIME, every_step)
    assert torch.equal(samples, expected)
    assert not report.notes
    assert "set aside" in caplog.text
    survived["damaged checkpoints"] += 1
    assert [file.suffix for file in every_step.folder.iterdir()] == [".broken"]


def test_a_full_or_read_only_disk_does_not_stop_the_sampling(
    model: I2VModel, plan: Plan, conditioning: Conditioning, tmp_path: Path, survived: Counter[str]
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("no folder")
    in_the_way.chmod(stat.S_IRUSR)
    chosen = Checkpointing(folder=in_the_way / "checkpoints", when=CheckpointWhen.EVERY_STEP)
    expected, _ = stages.sample(model, plan, conditioning, SETTINGS, RUNTIME)
    samples, report = stages.sample(model, plan, conditioning, SETTINGS, RUNTIME, chosen)
    assert torch.equal(samples, expected)
    assert "no checkpoint could be written" in report.notes[0]
    survived["disks that cannot be written to"] += 1


def test_short_runs_write_no_checkpoint_unless_asked_to(
    model: I2VModel, plan: Plan, conditioning: Conditioning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    automatic = Checkpointing(folder=tmp_path / "auto")
    assert cancelled(model, plan, conditioning, SETTINGS, 3, automatic) is None
    off = Checkpointing(folder=tmp_path / "off", when=CheckpointWhen.OFF)
    assert cancelled(model, plan, conditioning, SETTINGS, 3, off) is None
    monkeypatch.setattr(checkpoint, "_WORTHWHILE_SECONDS", 0.0)
    assert cancelled(model, plan, conditioning, SETTINGS, 3, automatic)


def test_long_runs_write_a_checkpoint_every_half_minute(
    model: I2VModel, plan: Plan, conditioning: Conditioning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run on a clock on which a step takes 25 seconds."""
    clock = 0.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock)
    kept: list[int] = []
    monkeypatch.setattr(checkpoint.CheckpointFile, "save", lambda _, state: kept.append(state.steps_done))
    file = checkpoint.CheckpointFile(Checkpointing(folder=tmp_path), "key", total_steps=6)
    due: list[bool] = []
    for step in range(1, 7):
        clock += 25.0
        due.append(file.is_due(step))
    assert due == [False, True, True, True, True, False]  # nothing was written in between; the last is the end
    clock = 0.0
    short = checkpoint.CheckpointFile(Checkpointing(folder=tmp_path), "key", total_steps=6)
    clock = 19.0
    assert not short.is_due(1)


def test_a_checkpoint_is_left_when_memory_runs_out_for_good(
    model: I2VModel, plan: Plan, conditioning: Conditioning, tmp_path: Path
) -> None:
    expected, _ = stages.sample(model, plan, conditioning, SETTINGS, RUNTIME)
    done = 0

    def progress(at: int, *_: object) -> None:
        nonlocal done
        done = at

    def fail() -> None:
        if done == 4:
            raise torch.OutOfMemoryError

    runtime = replace(RUNTIME, on_progress=progress, check_cancelled=fail)
    automatic = Checkpointing(folder=tmp_path)
    with pytest.raises(RanOutError, match=r"at step 4 of 6.*continue from step 4, saved in"):
        stages.sample(model, plan, conditioning, SETTINGS, runtime, automatic)
    samples, report = stages.sample(model, plan, conditioning, SETTINGS, RUNTIME, automatic)
    assert torch.allclose(samples, expected, atol=2e-5)
    assert "step 4 of 6" in report.notes[0]


@pytest.mark.slow
def test_old_checkpoints_do_not_pile_up(
    model: I2VModel, plan: Plan, conditioning: Conditioning, every_step: Checkpointing
) -> None:
    for seed in range(20):
        cancelled(model, plan, conditioning, replace(SETTINGS, seed=seed), 1, every_step)
    assert len(list(every_step.folder.iterdir())) == 16
