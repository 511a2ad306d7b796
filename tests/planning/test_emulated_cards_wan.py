"""Plans for a Wan of each layout run on emulated cards of their size, as those of image autoencoders do."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor

from i2v_core import stages
from i2v_core.families import I2VModel, Prompt, VideoSize, family_of, load_model
from i2v_core.memory.device import device_facts
from i2v_core.memory.stage_meter import stage_meter
from i2v_core.placement.storage import WeightStorage
from i2v_core.planning.frame_ways import decode_ways, encode_ways
from i2v_core.planning.margin import needed_bytes
from i2v_core.planning.plan import EncodeSettings, Plan, Stage
from i2v_core.planning.planner import least_peak, make_plan
from i2v_core.planning.predict import predict_decode, predict_encode, predict_sample
from i2v_core.planning.request import Budget, Request
from i2v_core.units import GIB, KIB

CPU = device_facts(torch.device("cpu"))
RUNTIME = stages.Runtime(device=torch.device("cpu"))
PROMPT = Prompt(
    image_FHWC=torch.rand(1, 70, 90, 3, generator=torch.Generator().manual_seed(0)),
    text="a red circle",
    negative_text="blue",
)
VECTORS_BYTES = 8 * KIB
"""For what predictions leave out: scales and shifts, of one number a channel, and attention's of one a token."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(wan_folder: Path) -> I2VModel:
    return load_model(wan_folder)


def run(model: I2VModel, plan: Plan) -> tuple[Tensor, list[stages.StageReport]]:
    """The frames, and the reports of the three stages; UniPC keeps most beside the denoiser."""
    settings = stages.SamplerSettings(steps=3, cfg=4.0 if plan.request.guidance else 1.0, seed=1, scheduler="unipc")
    conditioning, encoded = stages.encode(model, plan, PROMPT, RUNTIME)
    samples, sampled = stages.sample(model, plan, conditioning, settings, RUNTIME)
    frames, decoded = stages.decode(model, plan, samples, RUNTIME)
    return frames, [encoded, sampled, decoded]


def check_predictions(plan: Plan, reports: list[stages.StageReport]) -> None:
    """At most 8 % above what is measured: in so small a model the 512 tokens of text outweigh the clip."""
    for report in reports:
        predicted, measured = plan.stage(report.stage), report.measured_peak_bytes
        assert measured <= needed_bytes(predicted, CPU) <= plan.budget.usable_bytes, report
        assert measured - VECTORS_BYTES <= predicted.peak_bytes <= 1.08 * measured, report


@pytest.mark.parametrize("seed", range(6))
def test_a_plan_for_a_card_runs_on_that_card(model: I2VModel, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random requests, with budgets from the least possible on."""
    rng = random.Random(seed)
    multiple = family_of(model.architecture).facts.size_multiple
    size = VideoSize(
        width_pixels=multiple * rng.randint(64 // multiple, 128 // multiple),
        height_pixels=multiple * rng.randint(64 // multiple, 128 // multiple),
        frames=4 * rng.randint(0, 3) + 1,
    )
    request = Request(
        architecture=model.architecture, size=size, guidance=seed % 3 > 0, precision=("fp32", "bf16")[seed % 2]
    )
    least = needed_bytes(least_peak(request, CPU), CPU)
    most = max(least, int(1.2 * make_plan(request, Budget(free_bytes=GIB), CPU).peak_bytes))
    plan = make_plan(request, Budget(free_bytes=least + int(rng.random() ** 2 * (most - least))), CPU)
    monkeypatch.setattr("i2v_core.stages.run.stage_meter", partial(stage_meter, limit_bytes=plan.budget.usable_bytes))
    frames, reports = run(model, plan)
    assert torch.isfinite(frames).all()
    assert frames.shape == (size.frames, size.height_pixels, size.width_pixels, 3)
    check_predictions(plan, reports)


def planned(model: I2VModel) -> Plan:
    size = VideoSize(width_pixels=96, height_pixels=64, frames=9)
    request = Request(architecture=model.architecture, size=size, precision="bf16")
    return make_plan(request, Budget(free_bytes=GIB), CPU)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("storage", [WeightStorage.AS_COMPUTED, WeightStorage.FP8])
def test_weights_in_any_storage_take_what_is_predicted(model: I2VModel, storage: WeightStorage, streamed: bool) -> None:
    plan = planned(model)
    sample = replace(plan.sample, weight_storage=storage, streamed=streamed, workspace_bytes=64 * KIB)
    plan = replace(plan, sample=sample, stages=(plan.stages[0], predict_sample(plan.request, sample), plan.stages[2]))
    check_predictions(plan, run(model, plan)[1])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [Stage.ENCODE, Stage.DECODE])
def test_every_way_to_take_frames_takes_what_is_predicted(model: I2VModel, stage: Stage) -> None:
    plan = planned(model)
    request, dtype = plan.request, plan.sample.compute_dtype
    samples = torch.randn(
        family_of(model.architecture).facts.latent_size(request.size).shape_bcthw,
        generator=torch.Generator().manual_seed(2),
    )
    for way in chain(*(encode_ways(request) if stage is Stage.ENCODE else decode_ways(request))):
        if isinstance(way, EncodeSettings):
            predicted = predict_encode(request, way, dtype)
            other = replace(plan, encode=way, stages=(predicted, *plan.stages[1:]))
            report = stages.encode(model, other, PROMPT, RUNTIME)[1]
        else:
            predicted = predict_decode(request, way, dtype)
            other = replace(plan, decode=way, stages=(*plan.stages[:2], predicted))
            report = stages.decode(model, other, samples, RUNTIME)[1]
        measured = report.measured_peak_bytes
        assert measured - 2 * VECTORS_BYTES <= predicted.peak_bytes <= 1.08 * measured, way


@pytest.mark.parametrize("stage", [Stage.SAMPLE, Stage.DECODE])
def test_a_card_that_runs_out_goes_on_and_gives_the_same(
    model: I2VModel, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode runs again through the frames that it has given out, and gives each out once."""
    plan = planned(model)
    settings = stages.SamplerSettings(steps=3, cfg=4.0, seed=1)
    conditioning, _ = stages.encode(model, plan, PROMPT, RUNTIME)
    samples, sampled = stages.sample(model, plan, conditioning, settings, RUNTIME)
    expected, decoded = stages.decode(model, plan, samples, RUNTIME)
    peak_bytes = {it.stage: it.measured_peak_bytes for it in (sampled, decoded)}[stage]
    monkeypatch.setattr("i2v_core.stages.run.stage_meter", partial(stage_meter, limit_bytes=peak_bytes - 1))
    if stage is Stage.SAMPLE:
        again, report = stages.sample(model, plan, conditioning, settings, RUNTIME)
        assert torch.allclose(again, samples, atol=0.1)
    else:
        again, report = stages.decode(model, plan, samples, RUNTIME)
        assert again.shape == expected.shape
        assert torch.allclose(again, expected, atol=0.05)
    assert report.notes
