"""Clips in the same calls of the denoiser: each as it is alone, within what is predicted, whatever others do."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from i2v_core import stages
from i2v_core.families import I2VModel, Prompt, family_of
from i2v_core.memory.device import device_facts
from i2v_core.memory.stage_meter import stage_meter
from i2v_core.planning.margin import needed_bytes
from i2v_core.planning.plan import Plan, SampleSettings, Stage
from i2v_core.planning.planner import make_plan
from i2v_core.planning.predict import predict_sample
from i2v_core.planning.request import Budget, Request
from i2v_core.sampling.checkpoint import Checkpointing, CheckpointWhen
from i2v_core.sampling.context import ContextWindows
from i2v_core.units import GIB, KIB
from tests.subjects import SUBJECTS, Subject, load_with_every_parameter

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = device_facts(torch.device("cpu"))
RUNTIME = stages.Runtime(device=torch.device("cpu"))
STEPS = 4
TOLERANCE = 1e-5
VECTORS_BYTES = 8 * KIB
"""Of each clip, for what predictions leave out: vectors of one number a channel or a token."""

PLAIN = SampleSettings(compute_dtype=torch.float32, batched_guidance=True)
PIECES_BYTES = 50_000
WAYS = {
    "whole": PLAIN,
    "chunked": replace(PLAIN, workspace_bytes=PIECES_BYTES),
    "sequential": replace(PLAIN, batched_guidance=False),
    "streamed": replace(PLAIN, streamed=True),
    "parked": replace(PLAIN, offload_skips=True),
    "all": replace(PLAIN, batched_guidance=False, workspace_bytes=PIECES_BYTES, streamed=True, offload_skips=True),
}


class StoppedError(Exception):
    """What a clip's own check raises."""


@pytest.fixture(scope="module")
def model(subject_folder: Path) -> I2VModel:
    return load_with_every_parameter(subject_folder)


@pytest.fixture(scope="module")
def i2vgen_xl(tiny_folder: Path) -> I2VModel:
    return load_with_every_parameter(tiny_folder)


def plan_of(model: I2VModel, subject: Subject, way: SampleSettings, clips: int = 1, frames: int = 3) -> Plan:
    request = Request(architecture=model.architecture, size=subject.size(64, 64, frames), precision="fp32")
    plan = make_plan(request, Budget(free_bytes=GIB), CPU)
    request = replace(request, clips=clips)
    return replace(plan.with_prediction(predict_sample(request, way)), request=request, sample=way)


def clip_of(model: I2VModel, plan: Plan, number: int) -> stages.SampleRequest:
    """With picture, words, seed and cfg of its own."""
    facts = family_of(model.architecture).facts
    text = "a red circle"[: 5 + number] if "text" in facts.optional_inputs else ""
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(number))
    conditioning, _ = stages.encode(model, plan, Prompt(image_FHWC=image, text=text), RUNTIME)
    names = [choice.name for choice in facts.schedulers]
    chosen = stages.SamplerSettings(
        steps=STEPS, cfg=2.0 + number, seed=number, scheduler="unipc" if "unipc" in names else names[-1]
    )
    return stages.SampleRequest(conditioning=conditioning, settings=chosen)


def alone(
    model: I2VModel, plan: Plan, clip: stages.SampleRequest, checkpointing: Checkpointing | None = None
) -> Tensor:
    return stages.sample(model, plan, clip.conditioning, clip.settings, RUNTIME, checkpointing, clip.state)[0]


def nobody(index: int, error: Exception) -> None:
    raise AssertionError(f"clip {index} left: {error!r}")


def together(
    model: I2VModel,
    plan: Plan,
    clips: list[stages.SampleRequest],
    *,
    runtime: stages.Runtime = RUNTIME,
    checkpointing: Checkpointing | None = None,
    pays: Callable[[float], bool] = lambda _: True,
    left: Callable[[int, Exception], None] = nobody,
) -> stages.BatchedResult:
    return stages.sample_batched(model, plan, clips, runtime, checkpointing, pays, left)


def relative_rms(result: Tensor, reference: Tensor) -> float:
    return ((result - reference).double().norm() / reference.double().norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subject", "way"),
    [(name, way) for name, it in SUBJECTS.items() for way in WAYS if it.denoiser.has_skips or way != "parked"],
    indirect=["subject"],
)
def test_each_clip_is_as_it_is_alone(model: I2VModel, subject: Subject, way: str) -> None:
    single = plan_of(model, subject, WAYS[way])
    clips = [clip_of(model, single, number) for number in range(3)]
    found = together(model, plan_of(model, subject, WAYS[way], clips=3), clips)
    assert found.problem is None
    assert not found.states
    for index, clip in enumerate(clips):
        assert relative_rms(found.samples[index], alone(model, single, clip)) <= TOLERANCE
    assert relative_rms(found.samples[0], found.samples[1]) > 0.1


def card_cases() -> Iterator[tuple[str, str, int]]:
    """Every model in these ways, two and three clips by turns."""
    for (at, name), (turn, way) in product(enumerate(SUBJECTS), enumerate(("whole", "sequential", "all"))):
        yield name, way, 2 + (at + turn) % 2


@pytest.mark.slow
@pytest.mark.parametrize(("subject", "way", "clips"), card_cases(), indirect=["subject"])
def test_a_card_of_the_predicted_size_holds_them(
    model: I2VModel, subject: Subject, way: str, clips: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its margin the prediction is never below what is measured; without it, at most 5 % above."""
    plan = plan_of(model, subject, WAYS[way], clips)
    asked = [clip_of(model, plan, number) for number in range(clips)]
    predicted = plan.prediction(Stage.SAMPLE)
    needed = needed_bytes(predicted, CPU)
    monkeypatch.setattr("i2v_core.stages.run.stage_meter", partial(stage_meter, limit_bytes=needed))
    found = together(model, plan, asked)
    assert found.problem is None
    measured = found.report.measured_peak_bytes
    assert measured - clips * VECTORS_BYTES <= predicted.peak_bytes <= 1.05 * measured


@dataclass
class Group:
    """Three clips of the small I2VGen-XL, and what each is alone."""

    model: I2VModel
    single: Plan
    plan: Plan
    clips: list[stages.SampleRequest]
    alone: list[Tensor]
    left: dict[int, Exception] = field(default_factory=dict[int, Exception])

    def run(self, **options: object) -> stages.BatchedResult:
        chosen = {"left": self.left.__setitem__, **options}
        return together(self.model, self.plan, self.clips, **chosen)  # pyright: ignore[reportArgumentType]

    def with_clip(self, index: int, **changes: object) -> Group:
        """The group again, with another clip in it."""
        changed = replace(self.clips[index], **changes)  # pyright: ignore[reportArgumentType]
        return replace(self, clips=[*self.clips[:index], changed, *self.clips[index + 1 :]], left={})

    def is_right(self, index: int, samples: Tensor) -> bool:
        return relative_rms(samples, self.alone[index]) <= TOLERANCE

    def goes_on_right(self, found: stages.BatchedResult) -> bool:
        """Whether those that go on alone come to what they would have been."""
        results = {
            index: alone(self.model, self.single, replace(self.clips[index], state=state))
            for index, state in found.states.items()
        }
        return all(self.is_right(index, samples) for index, samples in (results | dict(found.samples)).items())


@pytest.fixture(scope="module")
def whole_group(i2vgen_xl: I2VModel) -> Group:
    subject = SUBJECTS["i2vgen-xl"]
    single = plan_of(i2vgen_xl, subject, PLAIN)
    clips = [clip_of(i2vgen_xl, single, number) for number in range(3)]
    return Group(
        model=i2vgen_xl,
        single=single,
        plan=plan_of(i2vgen_xl, subject, PLAIN, clips=3),
        clips=clips,
        alone=[alone(i2vgen_xl, single, clip) for clip in clips],
    )


@pytest.fixture
def group(whole_group: Group) -> Group:
    return replace(whole_group, left={})


class AtCall:
    """Fails in the so manieth call of what `Runtime.check_cancelled` is: once a layer."""

    def __init__(self, call: int, error: Exception) -> None:
        self._left, self._error = call, error

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise self._error


class AfterStep:
    """A clip's check, which raises after so many steps."""

    def __init__(self, step: int) -> None:
        self._left = step

    def __call__(self) -> None:
        self._left -= 1
        if self._left <= 0:
            raise StoppedError


def test_in_context_windows_too(i2vgen_xl: I2VModel) -> None:
    way = replace(PLAIN, context=ContextWindows(context_length=4, context_overlap=1))
    subject = SUBJECTS["i2vgen-xl"]
    single = plan_of(i2vgen_xl, subject, way, frames=7)
    clips = [clip_of(i2vgen_xl, single, number) for number in range(2)]
    found = together(i2vgen_xl, plan_of(i2vgen_xl, subject, way, clips=2, frames=7), clips)
    for index, clip in enumerate(clips):
        assert relative_rms(found.samples[index], alone(i2vgen_xl, single, clip)) <= TOLERANCE


def test_one_that_is_cancelled_leaves_after_its_step_and_the_others_go_on(group: Group, tmp_path: Path) -> None:
    """It goes on later from its checkpoint."""
    checkpointing = Checkpointing(folder=tmp_path, when=CheckpointWhen.EVERY_STEP)
    one = group.with_clip(1, check_cancelled=AfterStep(2))
    found = one.run(checkpointing=checkpointing)
    assert isinstance(one.left[1], StoppedError)
    assert sorted(found.samples) == [0, 2]
    assert found.problem is None
    assert one.goes_on_right(found)
    assert len(list(tmp_path.iterdir())) == 1
    assert group.is_right(1, alone(group.model, group.single, group.clips[1], checkpointing))


def test_those_that_have_come_less_far_catch_up_first(
    group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill: of three clips one has a checkpoint of step 3, one of step 1, one none."""
    checkpointing = Checkpointing(folder=tmp_path, when=CheckpointWhen.EVERY_STEP)
    for index, step in ((0, 3), (2, 1)):
        clip, stop = group.clips[index], AfterStep(step)
        runtime = replace(RUNTIME, on_progress=lambda *_, stop=stop: stop())
        with pytest.raises(StoppedError):
            stages.sample(group.model, group.single, clip.conditioning, clip.settings, runtime, checkpointing)
    passes: Counter[int] = Counter()
    family = family_of(group.model.architecture)
    denoise = family.denoise

    def counted(denoiser: torch.nn.Module, latents: Tensor, *inputs: object) -> Tensor:
        passes[len(latents) // 2] += 1  # both branches of guidance
        return denoise(denoiser, latents, *inputs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(type(family), "denoise", lambda _, *inputs: counted(*inputs))
    found = group.run(checkpointing=checkpointing)
    assert passes == {1: 1, 2: 2, 3: 1}
    assert sorted(found.samples) == [0, 1, 2]
    assert group.goes_on_right(found)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", range(2, STEPS))
def test_what_does_not_pay_goes_on_alone_from_that_step(group: Group, step: int) -> None:
    """The first step warms up, and says nothing."""
    told: list[float] = []

    def pays(seconds: float) -> bool:
        told.append(seconds)
        return len(told) + 1 < step

    found = group.run(pays=pays)
    assert isinstance(found.problem, stages.NotWorthBatchingError)
    assert min(told) > 0
    assert [found.states[index].steps_done for index in range(3)] == [step] * 3
    assert group.goes_on_right(found)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("of one clip, or of the card")])
def test_what_fails_in_the_middle_of_a_step_costs_that_step(
    group: Group, error: Exception, tmp_path: Path, survived: Counter[str]
) -> None:
    checkpointing = Checkpointing(folder=tmp_path, when=CheckpointWhen.EVERY_STEP)
    calls = Counter[str]()
    group.run(runtime=replace(RUNTIME, check_cancelled=lambda: calls.update(["layer"])))
    runtime = replace(RUNTIME, check_cancelled=AtCall(calls["layer"] * 5 // 8, error))
    found = group.run(runtime=runtime, checkpointing=checkpointing)
    survived["errors while clips are sampled together"] += 1
    assert found.problem is error
    assert not group.left
    assert [found.states[index].steps_done for index in range(3)] == [2] * 3
    assert len(list(tmp_path.iterdir())) == 3
    assert group.goes_on_right(found)


def test_all_stop_in_the_middle_of_a_step_where_all_are_to(group: Group) -> None:
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise StoppedError

    stopping = replace(group, clips=[replace(clip, check_cancelled=check) for clip in group.clips])
    calls = 0

    def in_a_layer() -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            stop.set()
        check()

    found = stopping.run(runtime=replace(RUNTIME, check_cancelled=in_a_layer))
    assert calls == 20
    assert sorted(stopping.left) == [0, 1, 2]
    assert not found.samples
    assert not found.states


def test_values_that_are_not_finite_are_that_clips_alone(group: Group) -> None:
    told = group.clips[1].conditioning
    broken = replace(
        told, positive={**told.positive, "image_embeddings": told.positive["image_embeddings"] * torch.nan}
    )
    one = group.with_clip(1, conditioning=broken)
    found = one.run()
    assert "not finite" in str(one.left[1])
    assert sorted(found.samples) == [0, 2]
    assert group.goes_on_right(found)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fails_at=st.integers(min_value=1, max_value=400),
    cancelled=st.dictionaries(st.integers(0, 2), st.integers(1, STEPS), max_size=2),
    slow_from=st.integers(min_value=1, max_value=STEPS + 1),
)
def test_whatever_happens_each_clip_ends_once_and_right(
    whole_group: Group, fails_at: int, cancelled: dict[int, int], slow_from: int
) -> None:
    group = replace(whole_group, left={})
    for index, step in cancelled.items():
        group = group.with_clip(index, check_cancelled=AfterStep(step))
    told = 0

    def pays(_: float) -> bool:
        nonlocal told
        told += 1
        return told < slow_from

    runtime = replace(RUNTIME, check_cancelled=AtCall(fails_at, torch.OutOfMemoryError("full")))
    found = group.run(runtime=runtime, pays=pays)
    ends = [*found.samples, *found.states, *group.left]
    assert sorted(ends) == [0, 1, 2]
    assert set(group.left) <= set(cancelled)
    assert whole_group.goes_on_right(found)
