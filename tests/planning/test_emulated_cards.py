"""Random requests on emulated cards: a plan for a card of N bytes runs on a card of N bytes.

The card is a count of live storages on the CPU that fails above its limit with a true `torch.OutOfMemoryError`. Weights
in place and all that a stage makes are counted; what belongs to the host's memory is not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, product
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet
from torch import Tensor

from i2v_core import stages
from i2v_core.decoding import TilingSettings
from i2v_core.errors import RanOutError
from i2v_core.families import Architecture, I2VModel, Prompt, VideoSize, family_of, load_model
from i2v_core.memory.device import device_facts
from i2v_core.memory.stage_meter import stage_meter
from i2v_core.placement.storage import WeightStorage
from i2v_core.planning.candidates import decode_candidates, encode_candidates
from i2v_core.planning.margin import needed_bytes
from i2v_core.planning.plan import DecodeSettings, Plan, Stage
from i2v_core.planning.planner import make_plan
from i2v_core.planning.predict import predict_sample, with_settings
from i2v_core.planning.request import Budget, Request
from i2v_core.planning.search import min_peak
from i2v_core.planning.suggestions import NothingFitsError
from i2v_core.sampling.context import ContextWindows
from i2v_core.units import GIB, KIB
from tests.marking import first_quick, quick_each
from tests.subjects import SUBJECTS, Subject

CPU = device_facts(torch.device("cpu"))
RUNTIME = stages.Runtime(device=torch.device("cpu"))
PICTURE = torch.rand(1, 70, 90, 3, generator=torch.Generator().manual_seed(0))
SIZES, REQUESTS = 10, 30
"""Of each model. Those of a size follow each other, and so share what a process has traced."""

VECTORS_BYTES = 8 * KIB
"""For what predictions leave out: statistics, scales and shifts, of one number a channel."""

SETTINGS = stages.SamplerSettings(steps=3, cfg=4.0, seed=1)

PutInCard = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A request, and a budget: 0 is the least that the request needs, 1 a fifth more than its plain run takes.

    The video is the smallest that holds `size`, in pixels and frames.
    """

    size: tuple[int, int, int]
    precision: str
    guidance: bool
    budget: float

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        return f"{size}-{self.precision}-{'guided' if self.guidance else 'unguided'}-{self.budget:.3f}"


def random_cases() -> list[Case]:
    rng = random.Random(20)
    sizes = [(8 * rng.randint(8, 16), 8 * rng.randint(8, 16), rng.randint(1, 8)) for _ in range(SIZES)]
    return [
        Case(
            size=sizes[index * SIZES // REQUESTS],
            precision=rng.choice(("fp32", "bf16")),
            guidance=rng.random() < 0.7,
            budget=rng.random() ** 2,  # tight ones more often
        )
        for index in range(REQUESTS)
    ]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(subject_folder: Path) -> I2VModel:
    return load_model(subject_folder)


@pytest.fixture(scope="module")
def i2vgen_xl(tiny_folder: Path) -> I2VModel:
    return load_model(tiny_folder)


@pytest.fixture
def put_in_card(monkeypatch: pytest.MonkeyPatch) -> PutInCard:
    """From its call on, stages run on a card of so many bytes."""

    def put(limit_bytes: int) -> None:
        monkeypatch.setattr("i2v_core.stages.run.stage_meter", partial(stage_meter, limit_bytes=limit_bytes))

    return put


@lru_cache(maxsize=REQUESTS)
def budget_range_bytes(request: Request) -> tuple[int, int]:
    """From the least that the request needs to a fifth more than its plain run takes."""
    least = needed_bytes(min_peak(request, CPU), CPU)
    return least, max(least, int(1.2 * make_plan(request, Budget(free_bytes=GIB), CPU).peak_bytes))


def plan_for(subject: Subject, model: I2VModel, case: Case) -> Plan:
    size = subject.size(*case.size)
    request = Request(architecture=model.architecture, size=size, guidance=case.guidance, precision=case.precision)
    least, most = budget_range_bytes(request)
    return make_plan(request, Budget(free_bytes=least + int(case.budget * (most - least))), CPU)


def prompt_for(model: I2VModel) -> Prompt:
    text, negative_text = (
        ("a red circle", "blue") if "text" in family_of(model.architecture).facts.optional_inputs else ("", "")
    )
    return Prompt(image_FHWC=PICTURE, text=text, negative_text=negative_text)


def settings_for(plan: Plan) -> stages.SamplerSettings:
    """With the scheduler that keeps most beside the denoiser, which plans leave room for: UniPC, from its third step
    on; or the family's last.
    """
    names = [choice.name for choice in family_of(plan.request.architecture).facts.schedulers]
    settings = replace(SETTINGS, scheduler="unipc" if "unipc" in names else names[-1])
    return settings if plan.request.guidance else replace(settings, cfg=1.0)


def run(model: I2VModel, plan: Plan) -> tuple[Tensor, list[stages.StageReport]]:
    """The frames, and the reports of the three stages."""
    settings = settings_for(plan)
    conditioning, encoded = stages.encode(model, plan, prompt_for(model), RUNTIME)
    samples, sampled = stages.sample(model, plan, conditioning, settings, RUNTIME)
    frames, decoded = stages.decode(model, plan, samples, RUNTIME)
    return frames, [encoded, sampled, decoded]


@pytest.mark.slow
@pytest.mark.parametrize("case", random_cases(), ids=str)
def test_a_plan_for_a_card_runs_on_that_card(
    subject: Subject, model: I2VModel, put_in_card: PutInCard, case: Case
) -> None:
    """With its margin a prediction is never below what is measured. Without it, it is at most some KiB below, whatever
    the size, and at most 5 % above.
    """
    plan = plan_for(subject, model, case)
    put_in_card(plan.budget.usable_bytes)
    frames, reports = run(model, plan)
    assert torch.isfinite(frames).all()
    size = plan.request.size
    assert frames.shape == (size.frames, size.height_pixels, size.width_pixels, 3)
    check_predictions(plan, reports)


def check_predictions(plan: Plan, reports: list[stages.StageReport]) -> None:
    for report in reports:
        predicted, measured = plan.prediction(report.stage), report.measured_peak_bytes
        assert measured <= needed_bytes(predicted, CPU) <= plan.budget.usable_bytes, report
        assert measured - VECTORS_BYTES <= predicted.peak_bytes <= 1.05 * measured, report


@pytest.mark.slow
def test_the_random_cases_take_every_way_that_plans_have(model_folders: Callable[[str], Path]) -> None:
    """Else the test above would say little. Of so small a Wan the denoiser takes less than the rest, so its plans alone
    would never divide its work.
    """
    plans = [
        plan_for(subject, load_model(model_folders(name)), case)
        for name, subject in SUBJECTS.items()
        for case in random_cases()[::2]
    ]
    assert {plan.sample.settings.streamed for plan in plans} == {True, False}
    assert {plan.sample.settings.batched_guidance for plan in plans if plan.request.guidance} == {True, False}
    assert {plan.sample.settings.workspace_bytes is None for plan in plans} == {True, False}
    assert {plan.encode.settings.streamed for plan in plans} == {True, False}
    assert {plan.decode.settings.tiling.by_layer for plan in plans} == {True, False}
    assert {plan.binding_stage.stage for plan in plans} == set(Stage)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_an_approximate_plan_runs_on_a_card_that_is_too_small_for_any_exact_one(
    i2vgen_xl: I2VModel, put_in_card: PutInCard, seed: int
) -> None:
    """Host memory is a byte too short for exact weights to stream from; those in 8 bits can."""
    model = i2vgen_xl
    rng = random.Random(seed)
    size = VideoSize(
        width_pixels=8 * rng.randint(8, 10), height_pixels=8 * rng.randint(8, 10), frames=rng.randint(2, 12)
    )
    request = Request(
        architecture=model.architecture, size=size, precision=rng.choice(("fp32", "bf16")), guidance=rng.random() < 0.7
    )
    allowed = replace(request, allow_approximate=True)
    plain = make_plan(request, Budget(free_bytes=GIB), CPU)
    host_bytes = predict_sample(request, replace(plain.sample.settings, streamed=True)).host_bytes - 1
    least, most = (needed_bytes(min_peak(it, CPU, host_bytes), CPU) for it in (allowed, request))
    budget = Budget(free_bytes=rng.randint(least, most - 1), host_free_bytes=host_bytes)
    with pytest.raises(NothingFitsError):
        make_plan(request, budget, CPU)
    plan = make_plan(allowed, budget, CPU)
    assert (
        plan.sample.settings.context is not None or plan.sample.settings.weight_storage is not WeightStorage.AS_COMPUTED
    )
    put_in_card(plan.budget.usable_bytes)
    frames, reports = run(model, plan)
    assert torch.isfinite(frames).all()
    check_predictions(plan, reports)


def storage_cases() -> Iterator[tuple[str, WeightStorage, bool, str]]:
    """Every model with every storage, in place and streamed, in fp32 and bf16 by turns."""
    for (at, name), (turn, storage), streamed in product(enumerate(SUBJECTS), enumerate(WeightStorage), (False, True)):
        yield name, storage, streamed, ("fp32", "bf16")[(at + turn + streamed) % 2]


@pytest.mark.parametrize(
    ("subject", "storage", "streamed", "precision"), quick_each(storage_cases()), indirect=["subject"]
)
def test_weights_in_any_storage_take_what_is_predicted(
    subject: Subject, model: I2VModel, put_in_card: PutInCard, storage: WeightStorage, streamed: bool, precision: str
) -> None:
    request = Request(architecture=model.architecture, size=subject.size(72, 64, 3), precision=precision)
    plan = make_plan(request, Budget(free_bytes=GIB), CPU)
    sample = replace(plan.sample.settings, weight_storage=storage, streamed=streamed, workspace_bytes=64 * KIB)
    plan = with_settings(plan, sample=sample)
    put_in_card(max(needed_bytes(it, CPU) for it in plan.predictions))
    check_predictions(plan, run(model, plan)[1])


@pytest.mark.parametrize(
    ("precision", "batched"), first_quick([("fp32", True), ("fp32", False), ("bf16", True), ("bf16", False)])
)
def test_windows_take_what_is_predicted(
    i2vgen_xl: I2VModel, put_in_card: PutInCard, precision: str, batched: bool
) -> None:
    model = i2vgen_xl
    size = VideoSize(width_pixels=72, height_pixels=64, frames=20)
    request = Request(architecture=model.architecture, size=size, precision=precision)
    plan = make_plan(request, Budget(free_bytes=GIB), CPU)
    context = ContextWindows(context_length=8, context_overlap=2)
    plan = with_settings(plan, sample=replace(plan.sample.settings, context=context, batched_guidance=batched))
    assert (
        plan.prediction(Stage.SAMPLE).peak_bytes
        < predict_sample(request, replace(plan.sample.settings, context=None)).peak_bytes
    )
    put_in_card(max(needed_bytes(it, CPU) for it in plan.predictions))
    check_predictions(plan, run(model, plan)[1])


def test_a_plan_takes_windows_where_nothing_else_fits_and_runs_on_that_card(
    i2vgen_xl: I2VModel, put_in_card: PutInCard
) -> None:
    model, size = i2vgen_xl, VideoSize(width_pixels=96, height_pixels=72, frames=32)
    request = Request(architecture=model.architecture, size=size, precision="bf16", allow_approximate=True)
    plan = make_plan(request, Budget(free_bytes=needed_bytes(min_peak(request, CPU), CPU)), CPU)
    assert plan.sample.settings.context is not None
    put_in_card(plan.budget.usable_bytes)
    frames, reports = run(model, plan)
    assert torch.isfinite(frames).all()
    check_predictions(plan, reports)


@pytest.fixture(scope="module")
def model_with_wide_skips(i2vgen_xl: I2VModel) -> I2VModel:
    """Its skip connections outweigh its layers, as those of the published model do."""
    model = i2vgen_xl
    torch.manual_seed(0)
    unet = I2VGenXLUNet(
        block_out_channels=(64, 64),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    configs = {name: model.architecture.config(name) for name, _ in model.architecture.configs}
    return replace(
        model,
        architecture=Architecture.from_configs(model.architecture.family, configs | {"unet": dict(unet.config)}),
        modules={**model.modules, "unet": unet.requires_grad_(False).eval()},
    )


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [False, True])
def test_a_plan_parks_skips_where_nothing_else_fits_and_runs_on_that_card(
    model_with_wide_skips: I2VModel, put_in_card: PutInCard, guidance: bool
) -> None:
    model, size = model_with_wide_skips, VideoSize(width_pixels=96, height_pixels=96, frames=24)
    request = Request(architecture=model.architecture, size=size, precision="fp32", guidance=guidance)
    plan = make_plan(request, Budget(free_bytes=needed_bytes(min_peak(request, CPU), CPU)), CPU)
    assert plan.sample.settings.offload_skips
    unparked = predict_sample(request, replace(plan.sample.settings, offload_skips=False))
    assert needed_bytes(unparked, CPU) > plan.budget.usable_bytes
    put_in_card(plan.budget.usable_bytes)
    frames, reports = run(model, plan)
    assert torch.isfinite(frames).all()
    check_predictions(plan, reports)


def stage_cases() -> Iterator[tuple[str, Stage, str]]:
    """Both stages of every model, in fp32 and bf16 by turns."""
    for (at, name), (turn, stage) in product(enumerate(SUBJECTS), enumerate((Stage.ENCODE, Stage.DECODE))):
        yield name, stage, ("fp32", "bf16")[(at + turn) % 2]


@pytest.mark.slow
@pytest.mark.parametrize(("subject", "stage", "precision"), stage_cases(), indirect=["subject"])
def test_every_way_to_take_frames_runs_on_a_card_of_its_size(
    subject: Subject, model: I2VModel, put_in_card: PutInCard, stage: Stage, precision: str
) -> None:
    """Also those that plans for so small a model never need, since its denoiser decides what fits."""
    request = Request(architecture=model.architecture, size=subject.size(104, 104, 3), precision=precision)
    plan = make_plan(request, Budget(free_bytes=GIB), CPU)
    samples = samples_like(subject, request.size)
    expected = stages.decode(model, plan, samples, RUNTIME)[0]
    for planned in every_way(plan, stage):
        put_in_card(needed_bytes(planned.prediction(stage), CPU) + VECTORS_BYTES)
        if stage is Stage.ENCODE:
            report = stages.encode(model, planned, prompt_for(model), RUNTIME)[1]
        else:
            frames, report = stages.decode(model, planned, samples, RUNTIME)
            assert torch.allclose(frames, expected, atol=1e-5 if precision == "fp32" else 5e-2)
        assert not report.notes
        measured, predicted = report.measured_peak_bytes, planned.prediction(stage).peak_bytes
        assert measured - 2 * VECTORS_BYTES <= predicted <= 1.05 * measured, (planned.encode, planned.decode)


def samples_like(subject: Subject, size: VideoSize) -> Tensor:
    """Any, of the host's LATENT."""
    facts = subject.family.facts
    samples_1CThw = torch.randn(facts.latent_size(size).shape_bcthw, generator=torch.Generator().manual_seed(2))
    return samples_1CThw if facts.latent_dimensions == 5 else samples_1CThw[0].transpose(0, 1)


def every_way(plan: Plan, stage: Stage) -> list[Plan]:
    """The plan with each way to run a stage."""
    if stage is Stage.ENCODE:
        return [with_settings(plan, encode=it) for it in chain(*encode_candidates(plan.request))]
    return [with_settings(plan, decode=it) for it in chain(*decode_candidates(plan.request))]


def tensors(model: I2VModel) -> dict[tuple[str, str], Tensor]:
    return {(name, key): it for name, module in model.modules.items() for key, it in module.state_dict().items()}


def state(model: I2VModel) -> dict[tuple[str, str], object]:
    """The place of every tensor, and every module's attributes and hooks."""
    held: dict[tuple[str, str], object] = {key: tensor.data_ptr() for key, tensor in tensors(model).items()}
    for name, module in model.modules.items():
        for path, part in module.named_modules():
            hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
            held[name, f"{path}.*"] = (set(vars(part)), hooks)
    return held


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("stage", list(Stage))
def test_a_card_one_byte_too_small_costs_a_rung_and_leaves_the_model_as_it_was(
    subject: Subject, model: I2VModel, put_in_card: PutInCard, stage: Stage, streamed: bool
) -> None:
    plan = plan_for(subject, model, Case(size=(96, 72, 4), precision="bf16", guidance=True, budget=0.5))
    plan = with_settings(
        plan,
        encode=replace(plan.encode.settings, streamed=streamed),
        sample=replace(plan.sample.settings, streamed=streamed, offload_skips=True),
        decode=DecodeSettings(tiling=TilingSettings(chunk_size=2), streamed=streamed),
    )
    conditioning, encoded = stages.encode(model, plan, prompt_for(model), RUNTIME)
    samples, sampled = stages.sample(model, plan, conditioning, settings_for(plan), RUNTIME)
    expected, decoded = stages.decode(model, plan, samples, RUNTIME)
    peak_bytes = {report.stage: report.measured_peak_bytes for report in (encoded, sampled, decoded)}
    alone = {
        Stage.ENCODE: lambda: stages.encode(model, plan, prompt_for(model), RUNTIME),
        Stage.SAMPLE: lambda: stages.sample(model, plan, conditioning, settings_for(plan), RUNTIME),
        Stage.DECODE: lambda: stages.decode(model, plan, samples, RUNTIME),
    }[stage]
    before, weights = state(model), {key: tensor.clone() for key, tensor in tensors(model).items()}

    put_in_card(peak_bytes[stage] - 1)
    if stage is Stage.ENCODE and streamed and subject.name.startswith("wan"):
        # Its text decides, and streams already.
        with pytest.raises(RanOutError, match="lowest-memory"):
            alone()
    else:
        assert alone()[1].notes
    assert state(model) == before
    assert all(torch.equal(tensor, weights[key]) for key, tensor in tensors(model).items())

    put_in_card(max(peak_bytes.values()))
    frames, _ = run(model, plan)
    assert torch.equal(frames, expected)
