"""Features of Stable Video Diffusion alone: rising guidance, noise on the picture, a temporal decoder.

Shape legend: C latent channels, T latent frames, h/w latent size, F frames, H/W pixel size.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from i2v_core import stages
from i2v_core.errors import BadInputError
from i2v_core.families import I2VModel, Prompt, VideoSize, family_of, load_model
from i2v_core.families.pictures import to_tensor
from i2v_core.memory.device import device_facts
from i2v_core.planning.plan import Plan
from i2v_core.planning.planner import make_plan
from i2v_core.planning.request import Budget, Request
from i2v_core.units import GIB
from tests.subjects import SUBJECTS, make_every_parameter_matter

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
RUNTIME = stages.Runtime(device=CPU)
SIZE = VideoSize(width_pixels=88, height_pixels=64, frames=5)
CFG = 3.0
SETTINGS = stages.SamplerSettings(steps=2, cfg=CFG, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> I2VModel:
    folder = tmp_path_factory.mktemp("reference") / "model"
    SUBJECTS["svd"].save(folder, seed=3)
    model = load_model(folder)
    for name in ("unet", "vae"):
        make_every_parameter_matter(model.modules[name])
    return model


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Return a picture of the video's size: the pipeline fits other sizes differently."""
    pixels = torch.rand(SIZE.height_pixels, SIZE.width_pixels, 3, generator=torch.Generator().manual_seed(0))
    return Image.fromarray((pixels * 255).byte().numpy())


@pytest.fixture(scope="module")
def plan(model: I2VModel) -> Plan:
    request = Request(architecture=model.architecture, size=SIZE, precision="fp32")
    return make_plan(request, Budget(free_bytes=GIB), device_facts(CPU))


def test_chunks_of_frames_would_change_what_layers_along_time_see(
    model: I2VModel, plan: Plan, picture: Image.Image
) -> None:
    """Show why we do not decode in chunks of frames."""
    prompt = Prompt(image_FHWC=to_tensor(picture).permute(0, 2, 3, 1))

    def decoded(**options: int) -> Tensor:
        return SUBJECTS["svd"].reference(
            model, prompt, SIZE, steps=2, cfg=CFG, seed=5, scheduler="auto", output_type="pt", **options
        )

    whole_FHWC, chunked_FHWC = decoded(), decoded(decode_chunk_size=2)
    assert (chunked_FHWC - whole_FHWC).norm() > 1e-2 * whole_FHWC.norm()


def test_guidance_rises_from_the_first_frame_to_the_last(model: I2VModel) -> None:
    scale = family_of(model.architecture).guidance_scale(CFG, SIZE.frames)
    assert isinstance(scale, Tensor)
    assert scale.flatten().tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]


def test_the_same_picture_gives_the_same_conditioning(model: I2VModel, plan: Plan, picture: Image.Image) -> None:
    """Check that the noise added to the picture is fixed."""
    prompt = Prompt(image_FHWC=to_tensor(picture).permute(0, 2, 3, 1))
    first, again, plain = (
        stages.encode(model, plan, replace(prompt, noise_augmentation=strength), RUNTIME)[0].positive["image_latents"]
        for strength in (0.5, 0.5, 0.0)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, plain, atol=1e-2)


def test_ignored_inputs_are_noted(model: I2VModel, plan: Plan, picture: Image.Image) -> None:
    prompt = Prompt(image_FHWC=to_tensor(picture).permute(0, 2, 3, 1), text="a red circle")
    _, report = stages.encode(model, plan, prompt, RUNTIME)
    assert report.notes == ("Stable Video Diffusion takes no prompt: it is ignored",)
    assert not stages.encode(model, plan, replace(prompt, text=""), RUNTIME)[1].notes


def test_other_schedulers_are_refused(model: I2VModel, plan: Plan, picture: Image.Image) -> None:
    prompt = Prompt(image_FHWC=to_tensor(picture).permute(0, 2, 3, 1))
    conditioning, _ = stages.encode(model, plan, prompt, RUNTIME)
    with pytest.raises(BadInputError, match=r"ddim.*auto, euler"):
        stages.sample(model, plan, conditioning, replace(SETTINGS, scheduler="ddim"), RUNTIME)
