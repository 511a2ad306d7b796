"""Batched sampling: each clip gets the result that it gets alone, within the predicted memory, whatever others do."""

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
from i2v_core.planning.predict import with_settings
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
"""Allowance per clip for vectors of one number per channel or token, which predictions leave out."""

PLAIN = SampleSettings(compute_dtype=torch.float32, batched_guidance=True)
CHUNKS_BYTES = 50_000
WAYS = {
    "unchunked": PLAIN,
    "chunked": replace(PLAIN, workspace_bytes=CHUNKS_BYTES),
    "sequential": replace(PLAIN, batched_guidance=False),
    "streamed": replace(PLAIN, streamed=True),
    "offloaded": replace(PLAIN, offload_skips=True),
    "all": replace(PLAIN, batched_guidance=False, workspace_bytes=CHUNKS_BYTES, streamed=True, offload_skips=True),
}


class StoppedError(Exception):
    """Raised by a clip's own `check_cancelled`."""


@pytest.fixture(scope="module")
def model(subject_folder: Path) -> I2VModel:
    return load_with_every_parameter(subject_folder)


@pytest.fixture(scope="module")
def i2vgen_xl(tiny_folder: Path) -> I2VModel:
    return load_with_every_parameter(tiny_folder)


def plan_of(model: I2VModel, subject: Subject, way: SampleSettings, clips: int = 1, frames: int = 3) -> Plan:
    request = Request(architecture=model.architecture, size=subject.size(64, 64, frames), precision="fp32")
    plan = make_plan(request, Budget(free_bytes=GIB), CPU)
    return with_settings(replace(plan, request=replace(request, clips=clips)), sample=way)


def clip_of(model: I2VModel, plan: Plan, number: int) -> stages.SampleRequest:
    """Make a request with its own picture, prompt, seed and cfg."""
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
    is_worthwhile: Callable[[float], bool] = lambda _: True,
    on_left: Callable[[int, Exception], None] = nobody,
) -> stages.BatchedResult:
    return stages.sample_batched(model, plan, clips, runtime, checkpointing, is_worthwhile, on_left)


def relative_rms(result: Tensor, reference: Tensor) -> float:
    return ((result - reference).double().norm() / reference.double().norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subject", "way"),
    [(name, way) for name, it in SUBJECTS.items() for way in WAYS if it.denoiser.has_skips or way != "offloaded"],
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
    for (at, name), (turn, way) in product(enumerate(SUBJECTS), enumerate(("unchunked", "sequential", "all"))):
        yield name, way, 2 + (at + turn) % 2


@pytest.mark.slow
@pytest.mark.parametrize(("subject", "way", "clips"), card_cases(), indirect=["subject"])
def test_a_card_of_the_predicted_size_holds_them(
    model: I2VModel, subject: Subject, way: str, clips: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the prediction: with its margin never below the measured peak, without it at most 5 % above."""
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
    """Three clips of the small I2VGen-XL, and the result of each alone."""

    model: I2VModel
    single: Plan
    plan: Plan
    clips: list[stages.SampleRequest]
    alone: list[Tensor]
    left: dict[int, Exception] = field(default_factory=dict[int, Exception])

    def run(self, **options: object) -> stages.BatchedResult:
        chosen = {"on_left": self.left.__setitem__, **options}
        return together(self.model, self.plan, self.clips, **chosen)  # pyright: ignore[reportArgumentType]

    def with_clip(self, index: int, **changes: object) -> Group:
        """Return the group with one clip changed."""
        changed = replace(self.clips[index], **changes)  # pyright: ignore[reportArgumentType]
        return replace(self, clips=[*self.clips[:index], changed, *self.clips[index + 1 :]], left={})

    def is_right(self, index: int, samples: Tensor) -> bool:
        return relative_rms(samples, self.alone[index]) <= TOLERANCE

    def continues_right(self, found: stages.BatchedResult) -> bool:
        """Return whether finished clips, and those that continue alone, get their results."""
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
    """A `Runtime.check_cancelled`, called once a layer, that raises at the given call."""

    def __init__(self, call: int, error: Exception) -> None:
        self._left, self._error = call, error

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise self._error


class AfterStep:
    """A clip's `check_cancelled` that raises after the given number of steps."""

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


def test_a_cancelled_clip_leaves_after_its_step_and_the_others_continue(group: Group, tmp_path: Path) -> None:
    """Check that it resumes later from its checkpoint."""
    checkpointing = Checkpointing(folder=tmp_path, when=CheckpointWhen.EVERY_STEP)
    one = group.with_clip(1, check_cancelled=AfterStep(2))
    found = one.run(checkpointing=checkpointing)
    assert isinstance(one.left[1], StoppedError)
    assert sorted(found.samples) == [0, 2]
    assert found.problem is None
    assert one.continues_right(found)
    assert len(list(tmp_path.iterdir())) == 1
    assert group.is_right(1, alone(group.model, group.single, group.clips[1], checkpointing))


def test_clips_furthest_behind_catch_up_first(group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start as after a kill: one clip has a checkpoint of step 3, one of step 1, one none."""
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
    assert group.continues_right(found)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", range(2, STEPS))
def test_a_batch_that_is_not_worthwhile_ends_and_clips_continue_from_that_step(group: Group, step: int) -> None:
    """Leave out the first step, which warms up."""
    step_seconds: list[float] = []

    def is_worthwhile(seconds: float) -> bool:
        step_seconds.append(seconds)
        return len(step_seconds) + 1 < step

    found = group.run(is_worthwhile=is_worthwhile)
    assert isinstance(found.problem, stages.NotWorthBatchingError)
    assert min(step_seconds) > 0
    assert [found.states[index].steps_done for index in range(3)] == [step] * 3
    assert group.continues_right(found)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("of one clip, or of the card")])
def test_a_failure_in_the_middle_of_a_step_costs_that_step(
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
    assert group.continues_right(found)


def test_cancelling_all_clips_stops_in_the_middle_of_a_step(group: Group) -> None:
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
    conditioning = group.clips[1].conditioning
    embeddings = conditioning.positive["image_embeddings"] * torch.nan
    broken = replace(conditioning, positive={**conditioning.positive, "image_embeddings": embeddings})
    one = group.with_clip(1, conditioning=broken)
    found = one.run()
    assert "not finite" in str(one.left[1])
    assert sorted(found.samples) == [0, 2]
    assert group.continues_right(found)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fails_at=st.integers(min_value=1, max_value=400),
    cancelled=st.dictionaries(st.integers(0, 2), st.integers(1, STEPS), max_size=2),
    slow_from=st.integers(min_value=1, max_value=STEPS + 1),
)
def test_whatever_happens_each_clip_ends_once_with_its_result(
    whole_group: Group, fails_at: int, cancelled: dict[int, int], slow_from: int
) -> None:
    group = replace(whole_group, left={})
    for index, step in cancelled.items():
        group = group.with_clip(index, check_cancelled=AfterStep(step))
    steps = 0

    def is_worthwhile(_: float) -> bool:
        nonlocal steps
        steps += 1
        return steps < slow_from

    runtime = replace(RUNTIME, check_cancelled=AtCall(fails_at, torch.OutOfMemoryError("full")))
    found = group.run(runtime=runtime, is_worthwhile=is_worthwhile)
    ends = [*found.samples, *found.states, *group.left]
    assert sorted(ends) == [0, 1, 2]
    assert set(group.left) <= set(cancelled)
    assert whole_group.continues_right(found)
