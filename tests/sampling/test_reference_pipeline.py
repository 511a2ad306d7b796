"""Faults of diffusers' pipeline for I2VGen-XL that ours does not have.

Shape legend: C latent channels, T latent frames, h/w latent size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import DDIMScheduler
from diffusers.pipelines.deprecated.i2vgen_xl import pipeline_i2vgen_xl
from PIL import Image

from i2v_core.chunking import LayerRunner
from i2v_core.decoding import ONE_FRAME_UNTILED
from i2v_core.families import FAMILIES, I2VModel, Placed, Prompt, VideoSize, family_of, load_model
from i2v_core.families.clip import encode_text, tokenize
from i2v_core.families.folder import read_json
from i2v_core.families.pictures import cover, to_tensor
from i2v_core.planning.plan import Stage
from i2v_core.planning.predict import component_dtype
from i2v_core.sampling.noise import initial_noise
from tests.subjects.i2vgen_xl import pipeline_of, reference

SIZE = VideoSize(width_pixels=64, height_pixels=64, frames=5)
diffusers_pipeline: Any = pipeline_i2vgen_xl
CFG, TEXT = 7.0, "a red circle moves left"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Callable[..., None]) -> I2VModel:
    folder = tmp_path_factory.mktemp("reference") / "model"
    save_tiny_model(folder, seed=3)
    return load_model(folder)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    torch.manual_seed(0)
    return Image.fromarray((torch.rand(64, 64, 3) * 255).byte().numpy())


def prompt_of(picture: Image.Image) -> Prompt:
    image_FHWC = to_tensor(picture).permute(0, 2, 3, 1)
    return Prompt(image_FHWC=image_FHWC, text=TEXT, negative_text="blue", fps=8)


def place(model: I2VModel) -> Any:
    def where_it_is(component: str, *, by_layer: bool = False) -> Any:
        assert not by_layer
        module = model.modules[component]
        return nullcontext(Placed(module=module, device=torch.device("cpu"), dtype=torch.float32, runner=LayerRunner()))

    return where_it_is


def conditioning(model: I2VModel, picture: Image.Image, size: VideoSize = SIZE) -> Any:
    with torch.no_grad():
        return family_of(model.architecture).encode(
            model, prompt_of(picture), size, True, ONE_FRAME_UNTILED, place(model), lambda: None
        )


def test_the_picture_does_not_depend_on_the_global_generator(model: I2VModel, picture: Image.Image) -> None:
    """The pipeline draws the picture's latents from the global generator: same seed, other video."""
    prompt = prompt_of(picture)
    latents, theirs = [], []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        latents.append(conditioning(model, picture).positive["image_latents"])
        theirs.append(reference(model, prompt, SIZE, steps=2, cfg=CFG, seed=5, scheduler="auto", output_type="latent"))
    assert not torch.equal(*theirs)
    assert torch.equal(*latents)


def test_no_border_row_is_left_empty() -> None:
    """The pipeline rounds the scaled picture down, and pads what is then missing with black."""
    white: Any = Image.new("RGB", (100, 75), "white")
    sizes = [(width, 64) for width in range(64, 257, 8)]
    theirs = [min(diffusers_pipeline._center_crop_wide(white, size).getextrema()[0]) for size in sizes]
    fitted: list[Any] = [cover(white, *size) for size in sizes]
    ours = [min(picture.getextrema()[0]) for picture in fitted]
    assert min(theirs) == 0
    assert min(ours) == 255


def test_where_the_pipeline_leaves_no_border_ours_is_the_same(picture: Image.Image) -> None:
    assert list(cover(picture, 32, 32).get_flattened_data()) == list(
        diffusers_pipeline._center_crop_wide(picture, (32, 32)).get_flattened_data()
    )


def test_the_text_encoder_works_on_this_transformers(model: I2VModel) -> None:
    """The pipeline looks for an inner model that transformers 5 no longer has."""
    if int(transformers.__version__.split(".")[0]) >= 5:
        with pytest.raises(AttributeError):
            pipeline_of(model, DDIMScheduler()).text_encoder.text_model  # noqa: B018
    text_encoder: Any = model.modules["text_encoder"]
    ids = tokenize(model.tokenizer, TEXT)
    with torch.no_grad():
        skipped, last = encode_text(text_encoder, ids, clip_skip=1), encode_text(text_encoder, ids, clip_skip=0)
        output = text_encoder(ids)
    assert torch.allclose(last, output.last_hidden_state, atol=1e-6)
    assert not torch.allclose(skipped, last, atol=1e-3)


def test_an_autoencoder_that_wants_full_precision_gets_it(tmp_path: Path, save_tiny_model: Callable[..., None]) -> None:
    """The pipeline runs every component in one precision."""
    save_tiny_model(tmp_path / "model")
    config_file = tmp_path / "model" / "vae" / "config.json"
    for force_upcast, expected in ((False, torch.float16), (True, torch.float32)):
        config_file.write_text(json.dumps({**read_json(config_file), "force_upcast": force_upcast}))
        architecture = load_model(tmp_path / "model").architecture
        for stage in Stage:
            assert component_dtype(architecture, "vae", torch.float16, stage) == expected
            assert component_dtype(architecture, "unet", torch.float16, stage) == torch.float16


def test_frame_zero_starts_from_the_same_noise_for_any_length() -> None:
    facts = FAMILIES["i2vgen-xl"].facts
    short, long = (
        initial_noise(facts.latent_size(VideoSize(width_pixels=64, height_pixels=64, frames=frames)), seed=9)
        for frames in (1, 24)
    )
    assert torch.equal(short[:, :, 0], long[:, :, 0])
    assert not torch.equal(long[:, :, 0], long[:, :, 1])
