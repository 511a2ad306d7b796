"""All stages of a Wan against diffusers' own pipeline: same weights, noise and settings, fp32."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor

from i2v_core import stages
from i2v_core.decoding import FramePieces
from i2v_core.families import I2VModel, Prompt, VideoSize, family_of, load_model
from i2v_core.memory.device import device_facts
from i2v_core.placement.storage import WeightStorage
from i2v_core.planning.plan import DecodeSettings, EncodeSettings, Plan, SampleSettings
from i2v_core.planning.planner import make_plan
from i2v_core.planning.request import Budget, Request
from i2v_core.sampling.noise import initial_noise
from i2v_core.sampling.schedulers import make_scheduler
from i2v_core.units import GIB, KIB

CPU = torch.device("cpu")
SIZE = VideoSize(width_pixels=64, height_pixels=96, frames=9)
STEPS, CFG, SEED = 5, 4.0, 3
PICTURE = torch.rand(1, 96, 64, 3, generator=torch.Generator().manual_seed(0)).mul(255).round().div(255)
PROMPT = Prompt(image_FHWC=PICTURE, text="a  red circle\nmoves &amp; stays", negative_text="blue")

PLAIN = SampleSettings(compute_dtype=torch.float32, batched_guidance=True)
WAYS = {
    "plain": PLAIN,
    "chunked": replace(PLAIN, workspace_bytes=100 * KIB),
    "sequential": replace(PLAIN, batched_guidance=False),
    "streamed": replace(PLAIN, streamed=True),
    "together": replace(PLAIN, batched_guidance=False, workspace_bytes=100 * KIB, streamed=True),
}
TILES = FramePieces(chunk_size=4, tile_pixels=24, maps_bytes=0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(wan_folder: Path) -> I2VModel:
    return load_model(wan_folder)


@pytest.fixture(scope="module")
def plan(model: I2VModel) -> Plan:
    return make_plan(
        Request(architecture=model.architecture, size=SIZE, precision="fp32"),
        Budget(free_bytes=GIB),
        device_facts(CPU),
    )


def pipeline_of(model: I2VModel, scheduler: str) -> Any:
    index: dict[str, Any] = json.loads((model.folder / "model_index.json").read_text())
    made = make_scheduler(
        family_of(model.architecture).facts.scheduler(scheduler), model.architecture.config("scheduler")
    )
    processor: Any = CLIPImageProcessor
    sees = "image_encoder" in model.modules
    pipeline: Any = WanImageToVideoPipeline
    return pipeline(
        tokenizer=model.tokenizer,
        text_encoder=model.modules["text_encoder"],
        vae=model.modules["vae"],
        scheduler=made,
        image_processor=processor.from_pretrained(model.folder / "image_processor") if sees else None,
        image_encoder=model.modules.get("image_encoder"),
        transformer=model.modules["transformer"],
        transformer_2=model.modules.get("transformer_2"),
        boundary_ratio=index.get("boundary_ratio"),
        expand_timesteps=bool(index.get("expand_timesteps")),
    )


def reference(model: I2VModel, scheduler: str, output_type: str) -> Tensor:
    pipeline = pipeline_of(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    picture = Image.fromarray((PICTURE[0] * 255).round().to(torch.uint8).numpy())
    # The pipeline mends the prompt's letters with ftfy, without looking whether it is installed.
    setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=lambda text: text))  # noqa: B010
    return pipeline(
        image=picture,
        prompt=PROMPT.text,
        negative_prompt=PROMPT.negative_text,
        height=SIZE.height_pixels,
        width=SIZE.width_pixels,
        num_frames=SIZE.frames,
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        latents=initial_noise(family_of(model.architecture).facts.latent_size(SIZE), SEED),
        output_type=output_type,
    ).frames[0]


def ours(model: I2VModel, plan: Plan, scheduler: str = "auto") -> tuple[Tensor, Tensor]:
    """The host's LATENT and the frames."""
    runtime = stages.Runtime(device=CPU)
    conditioning, _ = stages.encode(model, plan, PROMPT, runtime)
    settings = stages.SamplerSettings(steps=STEPS, cfg=CFG, seed=SEED, scheduler=scheduler)
    samples, _ = stages.sample(model, plan, conditioning, settings, runtime)
    return samples, stages.decode(model, plan, samples, runtime)[0]


def relative_rms(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).double().norm() / expected.double().norm()).item()


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_all_stages_equal_the_pipeline(model: I2VModel, plan: Plan, scheduler: str) -> None:
    samples, frames = ours(model, plan, scheduler)
    expected = reference(model, scheduler, "pt").permute(0, 2, 3, 1)
    assert frames.shape == expected.shape == (9, 96, 64, 3)
    assert relative_rms(frames, expected) <= 1e-5
    mean, deviation = (
        torch.tensor(model.architecture.config("vae")[name]).view(-1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    latents = reference(model, scheduler, "latent")
    assert relative_rms(samples[0], latents * deviation + mean) <= 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same(model: I2VModel, plan: Plan, way: str) -> None:
    samples, frames = ours(model, plan)
    other = replace(
        plan,
        encode=EncodeSettings(picture=TILES, streamed=WAYS[way].streamed),
        sample=WAYS[way],
        decode=DecodeSettings(frames=TILES, streamed=WAYS[way].streamed),
    )
    other_samples, other_frames = ours(model, other)
    assert relative_rms(other_samples, samples) <= 1e-5
    assert relative_rms(other_frames, frames) <= 1e-5


@pytest.mark.parametrize("storage", [WeightStorage.FP8])
def test_weights_in_8_bits_come_close(model: I2VModel, plan: Plan, storage: WeightStorage) -> None:
    samples, _ = ours(model, plan)
    for streamed in (False, True):
        other = replace(plan, sample=replace(PLAIN, weight_storage=storage, streamed=streamed))
        assert 1e-4 <= relative_rms(ours(model, other)[0], samples) <= 0.1


def test_bf16_keeps_positions_time_steps_and_norms_in_fp32(model: I2VModel, plan: Plan) -> None:
    """So that it stays as close to fp32 as what diffusers loads in bf16."""
    samples, _ = ours(model, plan)
    half, _ = ours(model, replace(plan, sample=replace(PLAIN, compute_dtype=torch.bfloat16)))
    assert relative_rms(half, samples) <= 5e-2
