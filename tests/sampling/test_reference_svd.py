"""Stable Video Diffusion: our encoders, loop and decoder against diffusers' own pipeline.

Shape legend: C latent channels, T latent frames, h/w latent size, F frames, H/W pixel size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor

from i2v_core import stages
from i2v_core.decoding import FramePieces
from i2v_core.errors import BadInputError
from i2v_core.families import Conditioning, I2VModel, Prompt, VideoSize, family_of, load_model
from i2v_core.families.pictures import to_tensor
from i2v_core.families.svd import AUGMENTATION_SEED
from i2v_core.memory.device import device_facts
from i2v_core.planning.plan import DecodeSettings, Plan
from i2v_core.planning.planner import make_plan
from i2v_core.planning.request import Budget, Request
from i2v_core.sampling.noise import initial_noise
from i2v_core.units import GIB

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
RUNTIME = stages.Runtime(device=CPU)
SIZE = VideoSize(width_pixels=88, height_pixels=64, frames=5)
STEPS, CFG, FPS, MOTION, AUGMENTATION = 6, 3.0, 9, 180, 0.1
SETTINGS = stages.SamplerSettings(steps=STEPS, cfg=CFG, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Callable[..., None]]) -> I2VModel:
    """Every parameter of the denoiser and of the decoder matters."""
    folder = tmp_path_factory.mktemp("reference") / "model"
    tiny_models["svd"](folder, seed=3)
    model = load_model(folder)
    generator = torch.Generator().manual_seed(0)
    for module in (model.modules["unet"], model.modules["vae"]):
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(0.5).add_(noise, alpha=0.5 / max(1, parameter[0].numel()) ** 0.5)
    return model


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Of the video's size: the pipeline and we fit others in different ways."""
    pixels = torch.rand(SIZE.height_pixels, SIZE.width_pixels, 3, generator=torch.Generator().manual_seed(0))
    return Image.fromarray((pixels * 255).byte().numpy())


@pytest.fixture(scope="module")
def plan(model: I2VModel) -> Plan:
    request = Request(architecture=model.architecture, size=SIZE, precision="fp32")
    return make_plan(request, Budget(free_bytes=GIB), device_facts(CPU))


@pytest.fixture(scope="module")
def conditioning(model: I2VModel, plan: Plan, picture: Image.Image) -> Conditioning:
    prompt = Prompt(
        image_FHWC=to_tensor(picture).permute(0, 2, 3, 1),
        fps=FPS,
        motion_bucket=MOTION,
        noise_augmentation=AUGMENTATION,
    )
    return stages.encode(model, plan, prompt, RUNTIME)[0]


def run_pipeline(model: I2VModel, picture: Image.Image, **options: Any) -> Any:
    """What diffusers' pipeline makes of the same noise and picture."""
    config = model.architecture.config("feature_extractor")
    pipeline, scheduler = cast("Any", StableVideoDiffusionPipeline), cast("Any", EulerDiscreteScheduler)
    pipe = pipeline(
        **model.modules,
        scheduler=scheduler.from_config(model.architecture.config("scheduler")),
        feature_extractor=CLIPImageProcessor(
            crop_size=config["crop_size"], image_mean=config["image_mean"], image_std=config["image_std"]
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    noise_1CThw = initial_noise(family_of(model.architecture).facts.latent_size(SIZE), SETTINGS.seed)
    return pipe(
        picture,
        width=SIZE.width_pixels,
        height=SIZE.height_pixels,
        num_frames=SIZE.frames,
        num_inference_steps=STEPS,
        max_guidance_scale=CFG,
        fps=FPS,
        motion_bucket_id=MOTION,
        noise_aug_strength=AUGMENTATION,
        generator=torch.Generator().manual_seed(AUGMENTATION_SEED),
        latents=noise_1CThw.transpose(1, 2),
        **options,
    ).frames


def relative(result: Tensor, reference: Tensor) -> float:
    return ((result - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("workspace_bytes", [None, 50_000])
@pytest.mark.parametrize("batched", [True, False])
def test_every_step_equals_the_pipeline(
    model: I2VModel,
    plan: Plan,
    conditioning: Conditioning,
    picture: Image.Image,
    batched: bool,
    workspace_bytes: int | None,
) -> None:
    """Each step starts from the one before, so the last latents are as far apart as all steps together."""
    way = replace(plan.sample, batched_guidance=batched, workspace_bytes=workspace_bytes)
    steps: list[int] = []

    def on_progress(done: int, *_: object) -> None:
        steps.append(done)

    runtime = replace(RUNTIME, on_progress=on_progress)
    ours_TChw, _ = stages.sample(model, replace(plan, sample=way), conditioning, SETTINGS, runtime)
    assert len(steps) == STEPS
    unscaled_TChw = run_pipeline(model, picture, output_type="latent")[0]
    theirs_TChw = unscaled_TChw / model.architecture.config("vae")["scaling_factor"]
    assert relative(ours_TChw, theirs_TChw) <= 1e-5


@pytest.mark.parametrize("tile_pixels", [0, 24])
def test_the_frames_equal_those_of_the_pipeline_that_decodes_all_at_once(
    model: I2VModel, plan: Plan, conditioning: Conditioning, picture: Image.Image, tile_pixels: int
) -> None:
    pieces = FramePieces(chunk_size=SIZE.frames, tile_pixels=tile_pixels)
    samples, _ = stages.sample(model, plan, conditioning, SETTINGS, RUNTIME)
    ours_FHWC, _ = stages.decode(model, replace(plan, decode=DecodeSettings(frames=pieces)), samples, RUNTIME)
    theirs_FHWC = run_pipeline(model, picture, output_type="pt")[0].permute(0, 2, 3, 1)
    assert theirs_FHWC.std() > 0.1
    assert relative(ours_FHWC, theirs_FHWC) <= 1e-5
    # Why chunks of frames are no way of ours: they change what layers along time see.
    chunked_FHWC = run_pipeline(model, picture, output_type="pt", decode_chunk_size=2)[0].permute(0, 2, 3, 1)
    assert relative(chunked_FHWC, theirs_FHWC) > 1e-2


def test_guidance_rises_from_the_first_frame_to_the_last(model: I2VModel) -> None:
    scale = family_of(model.architecture).guidance_scale(CFG, SIZE.frames)
    assert isinstance(scale, Tensor)
    assert scale.flatten().tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]


def test_the_same_picture_gives_the_same_conditioning(model: I2VModel, plan: Plan, picture: Image.Image) -> None:
    """Though noise is added to it."""
    prompt = Prompt(image_FHWC=to_tensor(picture).permute(0, 2, 3, 1))
    first, again, plain = (
        stages.encode(model, plan, replace(prompt, noise_augmentation=strength), RUNTIME)[0].positive["image_latents"]
        for strength in (0.5, 0.5, 0.0)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, plain, atol=1e-2)


def test_what_it_takes_no_heed_of_is_said(model: I2VModel, plan: Plan, picture: Image.Image) -> None:
    prompt = Prompt(image_FHWC=to_tensor(picture).permute(0, 2, 3, 1), text="a red circle")
    _, report = stages.encode(model, plan, prompt, RUNTIME)
    assert report.notes == ("Stable Video Diffusion takes no prompt: what was given has no effect",)
    assert not stages.encode(model, plan, replace(prompt, text=""), RUNTIME)[1].notes


def test_other_schedulers_are_refused(model: I2VModel, plan: Plan, conditioning: Conditioning) -> None:
    with pytest.raises(BadInputError, match=r"ddim.*auto, euler"):
        stages.sample(model, plan, conditioning, replace(SETTINGS, scheduler="ddim"), RUNTIME)
