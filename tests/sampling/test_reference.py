"""All stages of each model equal diffusers' own pipeline with the same weights, noise and settings, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from i2v_core import stages
from i2v_core.decoding import TilingSettings
from i2v_core.families import I2VModel, Prompt, load_model
from i2v_core.memory.device import device_facts
from i2v_core.planning.plan import DecodeSettings, EncodeSettings, Plan
from i2v_core.planning.planner import make_plan
from i2v_core.planning.predict import with_settings
from i2v_core.planning.request import Budget, Request
from i2v_core.units import GIB
from tests.marking import quick_each
from tests.measures import relative_rms
from tests.subjects import SUBJECTS, Subject, make_every_parameter_matter

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
RUNTIME = stages.Runtime(device=CPU)
STEPS, CFG, SEED = 5, 4.0, 3
# The video's size: pipelines fit pictures of other sizes differently.
WIDTH, HEIGHT, FRAMES = 96, 64, 5
PICTURE = torch.rand(1, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(0)).mul(255).round().div(255)
PROMPT = Prompt(
    image_FHWC=PICTURE,
    text="a  red circle\nmoves &amp; stays",
    negative_text="blue",
    fps=9,
    motion_bucket=180,
    noise_augmentation=0.1,
)
TILES = 24
SCHEDULERS = [(name, choice.name) for name, it in SUBJECTS.items() for choice in it.family.facts.schedulers]


@pytest.fixture(scope="module")
def model(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> I2VModel:
    folder = tmp_path_factory.mktemp("reference") / "model"
    subject.save(folder, seed=3)
    model = load_model(folder)
    for module in model.modules.values():
        make_every_parameter_matter(module)
    subject.before_reference(model)
    return model


@pytest.fixture(scope="module")
def plan(subject: Subject, model: I2VModel) -> Plan:
    size = subject.size(WIDTH, HEIGHT, FRAMES)
    request = Request(architecture=model.architecture, size=size, precision="fp32")
    return make_plan(request, Budget(free_bytes=GIB), device_facts(CPU))


@pytest.fixture(scope="module")
def reference(subject: Subject, model: I2VModel, plan: Plan) -> Callable[..., Tensor]:
    def run(output_type: str, scheduler: str = "auto") -> Tensor:
        return subject.reference(
            model,
            PROMPT,
            plan.request.size,
            steps=STEPS,
            cfg=CFG,
            seed=SEED,
            scheduler=scheduler,
            output_type=output_type,
        )

    return run


def ours(model: I2VModel, plan: Plan, scheduler: str = "auto") -> tuple[Tensor, Tensor]:
    """Run our stages; return the host's LATENT and the frames."""
    conditioning, _ = stages.encode(model, plan, PROMPT, RUNTIME)
    settings = stages.SamplerSettings(steps=STEPS, cfg=CFG, seed=SEED, scheduler=scheduler)
    samples, _ = stages.sample(model, plan, conditioning, settings, RUNTIME)
    return samples, stages.decode(model, plan, samples, RUNTIME)[0]


@pytest.mark.parametrize(("subject", "scheduler"), quick_each(SCHEDULERS), indirect=["subject"])
def test_latents_equal_those_of_the_pipeline(
    model: I2VModel, plan: Plan, reference: Callable[..., Tensor], scheduler: str
) -> None:
    """Compare the last latents, whose difference includes that of all steps before."""
    samples, _ = ours(model, plan, scheduler)
    assert relative_rms(samples, reference("latent", scheduler)) <= 1e-5


@pytest.mark.slow
def test_frames_equal_those_of_the_pipeline_chunked_too(
    model: I2VModel, plan: Plan, reference: Callable[..., Tensor]
) -> None:
    expected = reference("pt")
    assert expected.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert expected.std() > 0.05
    assert relative_rms(ours(model, plan)[1], expected) <= 1e-5
    tiles = TilingSettings(chunk_size=plan.decode.settings.tiling.chunk_size, tile_pixels=TILES, maps_bytes=0)
    chunked = with_settings(
        plan,
        encode=EncodeSettings(tiling=replace(tiles, chunk_size=1), streamed=True),
        sample=replace(
            plan.sample.settings, batched_guidance=False, workspace_bytes=50_000, streamed=True, offload_skips=True
        ),
        decode=DecodeSettings(tiling=tiles, streamed=True),
    )
    assert relative_rms(ours(model, chunked)[1], expected) <= 1e-5
