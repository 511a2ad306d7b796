"""Every memory-saving setting, alone and all together, against the model's own forward: 20 steps with guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from i2v_core import stages
from i2v_core.families import Conditioning, I2VModel, Prompt, TensorMap, family_of
from i2v_core.memory.device import device_facts
from i2v_core.placement.placed import placed
from i2v_core.placement.precision import PRECISIONS
from i2v_core.placement.storage import WeightStorage
from i2v_core.planning.plan import Plan, SampleSettings
from i2v_core.planning.planner import make_plan
from i2v_core.planning.predict import predict_sample, with_settings
from i2v_core.planning.request import Budget, Request
from i2v_core.sampling.loop import Guidance, SampleLoop
from i2v_core.sampling.noise import initial_noise
from i2v_core.sampling.schedulers import make_scheduler
from i2v_core.units import GIB
from tests.measures import relative_rms
from tests.subjects import SUBJECTS, Subject, load_with_every_parameter

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CPU = torch.device("cpu")
WIDTH, HEIGHT, FRAMES = 64, 64, 3
STEPS, SEED = 20, 3
PROMPT = Prompt(
    image_FHWC=torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0)),
    text="a red circle",
    negative_text="blue",
    fps=8,
)
# So little that the larger layers of the small model are cut into several chunks.
WORKSPACE_BYTES = 50_000
WAYS = {
    "chunked": SampleSettings(compute_dtype=torch.float32, batched_guidance=True, workspace_bytes=WORKSPACE_BYTES),
    "sequential": SampleSettings(compute_dtype=torch.float32, batched_guidance=False),
    "streamed": SampleSettings(compute_dtype=torch.float32, batched_guidance=True, streamed=True),
    "offloaded": SampleSettings(compute_dtype=torch.float32, batched_guidance=True, offload_skips=True),
    "together": SampleSettings(
        compute_dtype=torch.float32,
        batched_guidance=False,
        workspace_bytes=WORKSPACE_BYTES,
        streamed=True,
        offload_skips=True,
    ),
}
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
# Bounds of the difference that weights in 8 bits make: at least the lower one, if they were used at all.
APPROXIMATE = [(WeightStorage.INT8, 1e-3, 2e-2), (WeightStorage.FP8, 3e-3, 5e-2)]


def settings_for(model: I2VModel) -> stages.SamplerSettings:
    return stages.SamplerSettings(steps=STEPS, cfg=family_of(model.architecture).facts.default_cfg, seed=SEED)


@pytest.fixture(scope="module")
def model(subject_folder: Path) -> I2VModel:
    return load_with_every_parameter(subject_folder)


@pytest.fixture(scope="module")
def plan(subject: Subject, model: I2VModel) -> Plan:
    size = subject.size(WIDTH, HEIGHT, FRAMES)
    request = Request(architecture=model.architecture, size=size, precision="fp32")
    return make_plan(request, Budget(free_bytes=GIB), device_facts(CPU))


@pytest.fixture(scope="module")
def conditioning(model: I2VModel, plan: Plan) -> Conditioning:
    return stages.encode(model, plan, PROMPT, stages.Runtime(device=CPU))[0]


@pytest.fixture(scope="module")
def plain(model: I2VModel, conditioning: Conditioning) -> Callable[[str], Tensor]:
    """Return the host's LATENT of the model's own forward by precision, with both guidance branches in one pass."""
    family, size = family_of(model.architecture), conditioning.size
    denoisers = family.denoisers(model.architecture)
    assert conditioning.negative is not None
    negative = conditioning.negative

    @lru_cache
    def latents(precision: str) -> Tensor:
        dtype = PRECISIONS[precision]
        scheduler = make_scheduler(family.facts.scheduler("auto"), model.architecture.config("scheduler"))
        scheduler.set_timesteps(STEPS)
        noise = initial_noise(family.facts.latent_size(size), SEED) * scheduler.init_noise_sigma

        def denoise(latents: Tensor, timestep: Tensor, inputs: TensorMap) -> Tensor:
            component = next(it.component for it in denoisers if float(timestep) >= it.from_timestep)
            return family.denoise(model.modules[component], latents, timestep, inputs)

        with torch.no_grad(), ExitStack() as stack:
            for denoiser in denoisers:
                stack.enter_context(placed(model.modules[denoiser.component], CPU, dtype))
            guidance = Guidance(
                denoise,
                {name: tensor.to(dtype) for name, tensor in conditioning.positive.items()},
                {name: tensor.to(dtype) for name, tensor in negative.items()},
                family.guidance_scale(settings_for(model).cfg, size.frames),
                batched=True,
            )
            loop = SampleLoop(scheduler, noise, lambda *_: None)
            final = loop.run(lambda at, time: guidance(at, time, dtype))
        return family.latents_to_host(model.architecture, final, conditioning.positive).float()

    return latents


def cases() -> Iterator[tuple[str, str, str]]:
    """Every model in every way, in fp32 and in half precision: fp16 and bf16 by turns, so that every model and every
    way meets each of them.
    """
    for (at, (name, subject)), (turn, way) in product(enumerate(SUBJECTS.items()), enumerate(WAYS)):
        if subject.denoiser.has_skips or way != "offloaded":
            yield name, way, "fp32"
            yield name, way, ("fp16", "bf16")[(at + turn) % 2]


@pytest.mark.parametrize(("subject", "way", "precision"), cases(), indirect=["subject"])
def test_equals_the_models_own_forward(
    model: I2VModel,
    plan: Plan,
    conditioning: Conditioning,
    plain: Callable[[str], Tensor],
    way: str,
    precision: str,
) -> None:
    settings = replace(WAYS[way], compute_dtype=PRECISIONS[precision])
    chunks = 0

    def count() -> None:
        nonlocal chunks
        chunks += 1

    runtime = stages.Runtime(device=CPU, check_cancelled=count)
    result, _ = stages.sample(model, with_settings(plan, sample=settings), conditioning, settings_for(model), runtime)
    assert relative_rms(result, plain(precision)) <= TOLERANCES[precision]
    if precision != "fp32":
        assert relative_rms(result, plain("fp32")) <= 1.1 * relative_rms(plain(precision), plain("fp32"))
    if settings.workspace_bytes is not None:
        passes = STEPS if settings.batched_guidance else 2 * STEPS
        layers = predict_sample(plan.request, settings).layers
        assert chunks > 1.2 * layers * passes, "the workspace should chunk layers"


def approximate_cases() -> Iterator[tuple[str, WeightStorage, float, float, str, bool]]:
    """Every model with every storage: in place in fp32, and streamed in bf16, by turns."""
    for (at, name), (turn, approximate) in product(enumerate(SUBJECTS), enumerate(APPROXIMATE)):
        yield name, *approximate, *(("fp32", False), ("bf16", True))[(at + turn) % 2]


@pytest.mark.parametrize(
    ("subject", "storage", "least", "most", "precision", "streamed"), approximate_cases(), indirect=["subject"]
)
def test_weights_in_8_bits_come_close_to_the_models_own_forward(
    model: I2VModel,
    plan: Plan,
    conditioning: Conditioning,
    plain: Callable[[str], Tensor],
    storage: WeightStorage,
    least: float,
    most: float,
    precision: str,
    streamed: bool,
) -> None:
    settings = replace(WAYS["chunked"], compute_dtype=PRECISIONS[precision], weight_storage=storage, streamed=streamed)
    result, _ = stages.sample(
        model, with_settings(plan, sample=settings), conditioning, settings_for(model), stages.Runtime(device=CPU)
    )
    assert least <= relative_rms(result, plain("fp32")) <= most
