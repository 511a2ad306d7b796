"""The stages on an emulated card: the CPU's result and memory, nothing on two devices, and no race.

It has CUDA's rules and no GPU: what only a card can show, its libraries' workspaces and its speed, the tests marked
`gpu` and the benchmarks measure.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from i2v_core import stages
from i2v_core.decoding import TilingSettings
from i2v_core.families import I2VModel, Prompt, family_of
from i2v_core.memory.device import DeviceFacts
from i2v_core.placement.storage import WeightStorage
from i2v_core.placement.swap import all_tensors
from i2v_core.planning.plan import DecodeSettings, EncodeSettings, Plan, SampleSettings, Stage
from i2v_core.planning.planner import make_plan
from i2v_core.planning.predict import with_settings
from i2v_core.planning.request import Budget, Request
from i2v_core.units import GIB, KIB
from tests.emulated_cuda import CARD, EmulatedCard, emulated_cuda
from tests.measures import relative_rms
from tests.subjects import SUBJECTS, Subject, load_with_every_parameter

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CPU = torch.device("cpu")
STEPS = 3
IMAGE = torch.rand(1, 70, 90, 3, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Settings of all stages, without the precision."""

    sample: SampleSettings
    encode: EncodeSettings
    decode: DecodeSettings


IN_PLACE = SampleSettings(compute_dtype=torch.float32, batched_guidance=True)
WORKSPACE_BYTES = 50_000
LOWEST_MEMORY = replace(
    IN_PLACE, batched_guidance=False, workspace_bytes=WORKSPACE_BYTES, streamed=True, offload_skips=True
)
WHOLE = TilingSettings(chunk_size=2)
TILES = TilingSettings(chunk_size=2, tile_pixels=32, maps_bytes=0)
WAYS = {
    "whole": Way(
        sample=IN_PLACE,
        encode=EncodeSettings(streamed=False, tiling=WHOLE),
        decode=DecodeSettings(streamed=False, tiling=WHOLE),
    ),
    "8 bits": Way(
        sample=replace(IN_PLACE, weight_storage=WeightStorage.FP8, workspace_bytes=WORKSPACE_BYTES),
        encode=EncodeSettings(streamed=False, tiling=replace(TILES, maps_bytes=100 * KIB)),
        decode=DecodeSettings(streamed=False, tiling=replace(TILES, maps_bytes=100 * KIB)),
    ),
    "lowest memory": Way(
        sample=LOWEST_MEMORY,
        encode=EncodeSettings(streamed=True, tiling=TILES),
        decode=DecodeSettings(streamed=True, tiling=TILES),
    ),
}


@pytest.fixture(scope="module")
def model(subject_folder: Path) -> I2VModel:
    return load_with_every_parameter(subject_folder)


@pytest.fixture
def card() -> Iterator[EmulatedCard]:
    """Provide a card that must be left empty, with nothing pinned for it and no tensor used before its copy ended."""
    gc.collect()
    with emulated_cuda() as card:
        yield card
        gc.collect()
        assert card.used_bytes == card.pinned_bytes == 0
    assert not card.races, card.races[0]


def plan_of(model: I2VModel, subject: Subject, way: Way, device: torch.device, precision: str = "fp32") -> Plan:
    request = Request(architecture=model.architecture, size=subject.size(64, 64, 5), precision=precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    plan = make_plan(
        request, Budget(free_bytes=4 * GIB), DeviceFacts(device=str(device), name="small", precisions=(dtype,))
    )
    sample = replace(
        way.sample, compute_dtype=dtype, offload_skips=way.sample.offload_skips and subject.denoiser.has_skips
    )
    return with_settings(plan, encode=way.encode, sample=sample, decode=way.decode)


def settings_of(model: I2VModel, steps: int = STEPS) -> stages.SamplerSettings:
    return stages.SamplerSettings(steps=steps, cfg=family_of(model.architecture).facts.default_cfg, seed=4)


def made(model: I2VModel, plan: Plan) -> tuple[tuple[Tensor, Tensor], list[stages.StageReport]]:
    """Run all stages, collecting garbage in between, which the next would count; return latents, frames and reports."""
    runtime = stages.Runtime(device=plan.device.torch_device)
    gc.collect()
    text = "a red circle" if "text" in family_of(model.architecture).facts.optional_inputs else ""
    conditioning, encoded = stages.encode(model, plan, Prompt(image_FHWC=IMAGE, text=text), runtime)
    gc.collect()
    samples, sampled = stages.sample(model, plan, conditioning, settings_of(model), runtime)
    gc.collect()
    frames, decoded = stages.decode(model, plan, samples, runtime)
    return (samples, frames), [encoded, sampled, decoded]


def cases() -> Iterator[tuple[str, str, str]]:
    """Every model in every way, in fp32 and bf16 by turns, so that every model and every way meets both."""
    for (at, name), (turn, way) in product(enumerate(SUBJECTS), enumerate(WAYS)):
        yield name, way, ("fp32", "bf16")[(at + turn) % 2]


@pytest.mark.parametrize(("subject", "way", "precision"), cases(), indirect=["subject"])
def test_a_card_gives_what_the_cpu_gives_and_takes_as_much(
    model: I2VModel, subject: Subject, card: EmulatedCard, way: str, precision: str
) -> None:
    stored = [tensor.data_ptr() for module in model.modules.values() for tensor in all_tensors(module)]
    found, reports = made(model, plan_of(model, subject, WAYS[way], CARD, precision))
    expected, counted = made(model, plan_of(model, subject, WAYS[way], CPU, precision))
    for result, reference in zip(found, expected, strict=True):
        assert result.device == CPU
        assert relative_rms(result, reference) <= 1e-5
    for report, of_cpu in zip(reports, counted, strict=True):
        # The CPU's inputs count where the stage begins with them, and a card's copies take memory on the way.
        most = 1.02 * of_cpu.measured_peak_bytes + 4 * KIB
        assert 0.9 * of_cpu.measured_peak_bytes <= report.measured_peak_bytes <= most
        assert report.measured_peak_bytes <= 1.06 * report.predicted_peak_bytes
    assert stored == [tensor.data_ptr() for module in model.modules.values() for tensor in all_tensors(module)]


def test_the_host_waits_for_the_card_a_few_times_a_step_and_not_for_each_layer(
    model: I2VModel, subject: Subject, card: EmulatedCard
) -> None:
    plan = plan_of(model, subject, WAYS["lowest memory"], CARD)
    runtime = stages.Runtime(device=CARD)
    conditioning, _ = stages.encode(model, plan, Prompt(image_FHWC=IMAGE, text=""), runtime)

    def waits(steps: int) -> int:
        before = card.streams.waits
        stages.sample(model, plan, conditioning, settings_of(model, steps), runtime)
        return card.streams.waits - before

    layer_calls = plan.sample.prediction.layer_calls
    assert (waits(6) - waits(3)) / 3 <= 15 < layer_calls


def test_sampling_falls_back_on_a_card_that_is_too_small(model: I2VModel, subject: Subject) -> None:
    plan = plan_of(model, subject, WAYS["whole"], CARD)
    expected, _ = made(model, plan_of(model, subject, WAYS["whole"], CPU))
    runtime = stages.Runtime(device=CARD)
    with emulated_cuda() as card:
        conditioning, _ = stages.encode(model, plan, Prompt(image_FHWC=IMAGE, text="a red circle"), runtime)
        gc.collect()
        card.limit_bytes = card.used_bytes + int(0.8 * plan.prediction(Stage.SAMPLE).peak_bytes)
        samples, report = stages.sample(model, plan, conditioning, settings_of(model), runtime)
    assert report.failed
    assert not card.races
    assert relative_rms(samples, expected[0]) <= 1e-5


def test_clips_are_sampled_together(model: I2VModel, subject: Subject, card: EmulatedCard) -> None:
    plan = plan_of(model, subject, WAYS["lowest memory"], CARD)
    both = replace(plan, request=replace(plan.request, clips=2))
    runtime = stages.Runtime(device=CARD)
    conditioning, _ = stages.encode(model, plan, Prompt(image_FHWC=IMAGE, text=""), runtime)
    clips = [
        stages.SampleRequest(conditioning=conditioning, settings=replace(settings_of(model), seed=seed))
        for seed in (4, 5)
    ]
    together = stages.sample_batched(model, both, clips, runtime, None, lambda _: True, lambda *_: None)
    assert together.problem is None
    for index, clip in enumerate(clips):
        alone, _ = stages.sample(model, plan, conditioning, clip.settings, runtime)
        assert relative_rms(together.samples[index], alone) <= 1e-5
