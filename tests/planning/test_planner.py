"""Plans: predicted right, within the budget, or refused with what would fit."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from i2v_core import stages
from i2v_core.errors import BadInputError, DoesNotFitError, PlanMismatchError
from i2v_core.families import Architecture, I2VModel, Prompt, VideoSize, load_model
from i2v_core.memory.calibration import Calibration, StageRatios
from i2v_core.memory.device import DeviceFacts, device_facts
from i2v_core.memory.device_memory import DeviceMemory
from i2v_core.planning.adjust import refit, with_tile
from i2v_core.planning.fit_limit import FitLimit
from i2v_core.planning.margin import expected_bytes, needed_bytes, uncertainty_bytes
from i2v_core.planning.plan import Plan, Stage, StagePlan
from i2v_core.planning.planner import make_plan
from i2v_core.planning.report import plan_as_dict, plan_reasons, report
from i2v_core.planning.request import Budget, Request
from i2v_core.planning.search import fits
from i2v_core.planning.suggestions import NothingFitsError
from i2v_core.units import GIB, KIB, MIB
from tests.marking import first_quick

CPU = device_facts(torch.device("cpu"))
SIZE = VideoSize(width_pixels=96, height_pixels=64, frames=6)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> I2VModel:
    return load_model(tiny_folder)


@pytest.fixture(scope="module")
def architecture(model: I2VModel) -> Architecture:
    return model.architecture


def request_for(architecture: Architecture, size: VideoSize = SIZE, **options: object) -> Request:
    return Request(architecture=architecture, size=size, **{"precision": "fp32", **options})  # type: ignore[arg-type]


def plan_for(architecture: Architecture, size: VideoSize = SIZE, free_bytes: int = GIB, **options: object) -> Plan:
    return make_plan(request_for(architecture, size, **options), Budget(free_bytes=free_bytes), CPU)


def least_bytes(request: Request) -> int:
    """The least budget that the planner says the request needs."""
    with pytest.raises(NothingFitsError) as raised:
        make_plan(request, Budget(free_bytes=1), CPU)
    return raised.value.suggestions.budget_bytes


@pytest.mark.parametrize("seed", first_quick(range(12), quick=4))
def test_what_is_predicted_is_what_is_measured(model: I2VModel, seed: int) -> None:
    """Random requests and budgets, run for real: never above the budget, predicted within 5 %."""
    rng = random.Random(seed)
    size = VideoSize(
        width_pixels=8 * rng.randint(8, 16), height_pixels=8 * rng.randint(8, 16), frames=rng.randint(1, 9)
    )
    request = request_for(model.architecture, size, guidance=rng.random() < 0.7)
    whole = make_plan(request, Budget(free_bytes=GIB), CPU)
    least = least_bytes(request)
    budget = Budget(free_bytes=rng.randint(least, max(least, int(whole.peak_bytes * 1.2))))
    plan = make_plan(request, budget, CPU)
    assert plan.peak_bytes <= budget.usable_bytes

    runtime = stages.Runtime(device=torch.device("cpu"))
    prompt = Prompt(image_FHWC=torch.rand(1, 70, 90, 3), text="a red circle", negative_text="", fps=8)
    conditioning, encoded = stages.encode(model, plan, prompt, runtime)
    cfg = 4.0 if request.guidance else 1.0
    settings = stages.SamplerSettings(steps=3, cfg=cfg, seed=seed, scheduler="unipc")  # which keeps most
    samples, sampled = stages.sample(model, plan, conditioning, settings, runtime)
    _, decoded = stages.decode(model, plan, samples, runtime)
    for done in (encoded, sampled, decoded):
        assert done.measured_peak_bytes <= budget.usable_bytes
        assert done.predicted_peak_bytes == pytest.approx(done.measured_peak_bytes, rel=0.05)


def test_a_smaller_budget_gives_a_thriftier_plan_with_the_same_result(model: I2VModel) -> None:
    request = request_for(model.architecture)
    rich = make_plan(request, Budget(free_bytes=GIB), CPU)
    poor = make_plan(request, Budget(free_bytes=least_bytes(request)), CPU)
    assert poor.peak_bytes < rich.peak_bytes
    assert rich.sample.settings.workspace_bytes is None
    assert poor.sample.settings.workspace_bytes is not None
    assert not poor.sample.settings.batched_guidance

    runtime = stages.Runtime(device=torch.device("cpu"))
    prompt = Prompt(image_FHWC=torch.rand(1, 64, 96, 3), text="a", negative_text="", fps=8)
    conditioning, _ = stages.encode(model, rich, prompt, runtime)
    settings = stages.SamplerSettings(steps=4, cfg=4.0, seed=1)
    expected, _ = stages.sample(model, rich, conditioning, settings, runtime)
    found, _ = stages.sample(model, poor, conditioning, settings, runtime)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_refusal_names_what_fits(architecture: Architecture) -> None:
    request = request_for(architecture, VideoSize(width_pixels=96, height_pixels=96, frames=64))
    budget = Budget(free_bytes=int(least_bytes(request) * 0.8))
    with pytest.raises(NothingFitsError) as raised:
        make_plan(request, budget, CPU)
    near = raised.value.suggestions
    assert near.shorter is not None
    assert near.smaller is not None
    for size in (near.shorter, near.smaller):
        make_plan(request_for(architecture, size), budget, CPU)
    longer = replace(near.shorter, frames=near.shorter.frames + 1)
    assert not fits(request_for(architecture, longer), CPU, FitLimit.of(budget, CPU))
    make_plan(request, Budget(free_bytes=near.budget_bytes), CPU)
    assert f"{near.shorter.frames} frames" in str(raised.value)
    assert "GiB" in raised.value.remedy


def test_the_same_request_always_gives_the_same_plan(architecture: Architecture) -> None:
    assert plan_for(architecture) == plan_for(architecture)


def test_precision_follows_the_device_and_the_budget(architecture: Architecture) -> None:
    turing = DeviceFacts(device="cpu", name="a Turing card", precisions=(torch.float16, torch.float32))
    request = request_for(architecture, precision="auto")
    assert make_plan(request, Budget(free_bytes=GIB), turing).precision == "fp16"
    assert make_plan(request, Budget(free_bytes=GIB), CPU).precision == "fp32"
    between = Budget(free_bytes=least_bytes(request_for(architecture)) - 1)
    assert make_plan(request, between, CPU).precision == "bf16"
    assert make_plan(request_for(architecture, precision="fp16"), Budget(free_bytes=GIB), CPU).precision == "fp16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width_pixels": 100}, "divisible by 8"),
        ({"height_pixels": 56}, "too small"),
        ({"frames": 0}, "at least 1 frame"),
        ({"frames": -3}, "at least 1 frame"),
    ],
)
def test_sizes_that_cannot_be_are_refused(architecture: Architecture, change: dict[str, int], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        request_for(architecture, replace(SIZE, **change))


def test_budgets_that_cannot_be_are_refused() -> None:
    for wrong in ({"limit_bytes": 0}, {"limit_bytes": -5}, {"reserve_bytes": -1}, {"reserve_bytes": 2 * GIB}):
        with pytest.raises(BadInputError):
            Budget(free_bytes=GIB, **wrong)


def test_a_precision_that_does_not_exist_is_refused(architecture: Architecture) -> None:
    with pytest.raises(BadInputError, match="fp64"):
        request_for(architecture, precision="fp64")


def test_the_report_tells_stages_binding_stage_and_reasons(architecture: Architecture) -> None:
    plan = plan_for(architecture)
    text = report(plan)
    assert all(stage.value in text for stage in Stage)
    assert f"decided by {plan.binding_stage.stage.value}" in text
    assert all(reason in text for reason in plan_reasons(plan))
    over = make_plan(plan.request, Budget(free_bytes=GIB, limit_bytes=2 * GIB), CPU)
    assert any("more than is free" in reason for reason in plan_reasons(over))


def test_whatever_follows_from_a_stage_changes_with_it(architecture: Architecture) -> None:
    plan = plan_for(architecture)
    settings = replace(plan.sample.settings, workspace_bytes=64 * KIB, streamed=True)
    prediction = replace(plan.sample.prediction, chunk_size=1, activation_bytes=2 * GIB)
    changed = plan.with_stage(StagePlan(settings, prediction))
    assert (changed.chunk_size, changed.peak_bytes) == (1, prediction.peak_bytes)
    assert changed.prediction(Stage.SAMPLE) is prediction
    assert (changed.encode, changed.decode) == (plan.encode, plan.decode)
    assert any("for: denoiser" in reason for reason in plan_reasons(changed))
    assert plan_as_dict(changed)["streamed"] == ["sample"]


def test_a_plan_is_kept_while_it_fits_and_made_again_when_it_does_not(architecture: Architecture) -> None:
    plan = plan_for(architecture)
    needed = needed_bytes(plan.prediction(Stage.SAMPLE), CPU)
    assert refit(plan, Stage.SAMPLE, DeviceMemory(free_bytes=needed)) is plan
    again = refit(plan, Stage.SAMPLE, DeviceMemory(free_bytes=needed - 1))
    assert needed_bytes(again.prediction(Stage.SAMPLE), CPU) < needed
    with pytest.raises(DoesNotFitError):
        refit(plan, Stage.SAMPLE, DeviceMemory(free_bytes=MIB // 2))


def test_a_tile_of_the_user_is_honoured_or_refused(architecture: Architecture) -> None:
    plan = plan_for(architecture, VideoSize(width_pixels=256, height_pixels=256, frames=2))
    tiled = with_tile(plan, 100, 0)
    assert (tiled.decode.settings.tiling.tile_pixels, tiled.decode.settings.tiling.maps_bytes) == (100, None)
    assert tiled.prediction(Stage.DECODE).peak_bytes < plan.prediction(Stage.DECODE).peak_bytes
    assert with_tile(plan, 0, 0) is plan
    with pytest.raises(BadInputError, match="at least 32"):
        with_tile(plan, 16, 0)
    with pytest.raises(BadInputError, match="no seams"):
        with_tile(plan, 128, 16)


def test_a_tile_of_the_user_has_maps_offloaded_before_it_is_refused(architecture: Architecture) -> None:
    plan = plan_for(architecture, VideoSize(width_pixels=256, height_pixels=256, frames=2))
    needed = needed_bytes(with_tile(plan, 64, 0).prediction(Stage.DECODE), CPU)
    offloaded = with_tile(replace(plan, budget=Budget(free_bytes=needed - MIB)), 64, 0)
    assert offloaded.decode.settings.tiling.tile_pixels == 64
    assert offloaded.decode.settings.tiling.maps_bytes is not None
    with pytest.raises(DoesNotFitError, match="smaller tile"):
        with_tile(replace(plan, budget=Budget(free_bytes=KIB)), 64, 0)


def test_a_plan_of_another_model_is_refused(architecture: Architecture) -> None:
    other = Architecture(architecture.family, architecture.configs[1:])
    with pytest.raises(PlanMismatchError, match="another model"):
        plan_for(architecture).check_made_for(other)


def test_what_shortening_cannot_help_is_not_shortened(architecture: Architecture) -> None:
    """Not even one frame as large as this fits."""
    request = request_for(architecture, VideoSize(width_pixels=256, height_pixels=256, frames=4))
    single = replace(request, size=replace(request.size, frames=1))
    with pytest.raises(NothingFitsError) as raised:
        make_plan(request, Budget(free_bytes=int(least_bytes(single) * 0.9)), CPU)
    assert raised.value.suggestions.shorter is None
    assert raised.value.suggestions.smaller is not None


def test_what_was_measured_changes_what_is_expected(architecture: Architecture) -> None:
    plan = plan_for(architecture)
    prediction = plan.prediction(Stage.SAMPLE)
    assert expected_bytes(prediction, CPU) == prediction.peak_bytes
    learned = Calibration((StageRatios(stage="sample", lowest=1.02, highest=1.10, runs=3),))
    taught = replace(CPU, calibration=learned)
    assert expected_bytes(prediction, taught) == int(prediction.peak_bytes * 1.10)
    assert uncertainty_bytes(prediction, taught) == pytest.approx(prediction.peak_bytes * 0.08, rel=1e-3)
    once = replace(CPU, calibration=Calibration((replace(learned.stages[0], runs=1),)))
    assert uncertainty_bytes(prediction, once) == pytest.approx(prediction.peak_bytes * 1.10 * 0.03, rel=1e-3)
    assert needed_bytes(prediction, taught) > needed_bytes(prediction, CPU)
    just_enough = Budget(free_bytes=max(needed_bytes(stage, CPU) for stage in plan.predictions))
    untaught = make_plan(plan.request, just_enough, CPU)
    assert make_plan(plan.request, just_enough, taught).sample != untaught.sample


def test_host_memory_is_a_limit_too(architecture: Architecture) -> None:
    """Streaming and parking take host memory; without it the plan does without them, or is refused."""
    request = request_for(architecture)
    budget = Budget(free_bytes=least_bytes(request))
    plan = make_plan(request, budget, CPU)
    assert plan.sample.settings.streamed
    taken = max(stage.host_bytes for stage in plan.predictions)
    assert make_plan(request, replace(budget, host_free_bytes=taken), CPU).sample.settings.streamed
    short = replace(budget, host_free_bytes=plan.prediction(Stage.SAMPLE).host_bytes - 1)
    with pytest.raises(NothingFitsError) as raised:
        make_plan(request, short, CPU)
    near = raised.value.suggestions
    assert near.host_bytes is not None
    assert "host memory" in raised.value.remedy
    make_plan(request, replace(short, host_free_bytes=near.host_bytes), CPU)
    more = replace(short, free_bytes=near.budget_bytes)
    assert not make_plan(request, more, CPU).sample.settings.streamed


def test_a_way_that_takes_less_of_the_host_is_found_where_thriftier_ones_take_more(architecture: Architecture) -> None:
    """Tiles need their frame in host memory too, streamed weights a copy there; whole frames no more than the clip."""
    plan = plan_for(architecture, VideoSize(width_pixels=64, height_pixels=72, frames=3))
    host_bytes = plan.prediction(Stage.DECODE).host_bytes
    budget = replace(plan.budget, host_free_bytes=host_bytes)
    assert make_plan(plan.request, budget, CPU).prediction(Stage.DECODE).host_bytes <= host_bytes


def test_no_precision_is_tried_that_takes_as_much_as_one_before(architecture: Architecture) -> None:
    """A precision that takes at least as much as one that did not fit is not traced."""
    request = request_for(architecture, precision="auto")
    assert request.precisions((torch.bfloat16, torch.float16, torch.float32)) == (torch.bfloat16,)
    assert request.precisions((torch.float32, torch.bfloat16)) == (torch.float32, torch.bfloat16)
    assert request_for(architecture, precision="fp16").precisions((torch.bfloat16,)) == (torch.float16,)
