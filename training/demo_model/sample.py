"""A plain sampling loop for the exported folder: I2VGen-XL's, with guidance.

Shapes: ``picture_CHW`` in [-1, 1], ``clips_BFCHW`` in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, I2VGenXLUNet
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from training.demo_model.noise import image_latents
from training.demo_model.text import text_states, tokenize
from training.demo_model.vision import embed_pictures


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoModel:
    """The parts of an exported folder."""

    unet: I2VGenXLUNet
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    image_encoder: CLIPVisionModelWithProjection
    scheduler: DDIMScheduler


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """guidance 1 leaves the negative half out; fps is only told to the model."""

    frames: int = 16
    steps: int = 20
    guidance: float = 2.0
    fps: int = 8
    seed: int = 0
    negative_prompt: str = ""


def load_demo_model(folder: Path, dtype: torch.dtype = torch.float32) -> DemoModel:
    def place(name: str) -> Path:
        return folder / name

    return DemoModel(
        unet=I2VGenXLUNet.from_pretrained(place("unet"), torch_dtype=dtype).eval(),
        vae=AutoencoderKL.from_pretrained(place("vae"), torch_dtype=dtype).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(place("tokenizer")),
        text_encoder=CLIPTextModel.from_pretrained(place("text_encoder"), dtype=dtype).eval(),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(place("image_encoder"), dtype=dtype).eval(),
        scheduler=DDIMScheduler.from_pretrained(place("scheduler")),
    )


@torch.no_grad()
def sample(model: DemoModel, picture_CHW: torch.Tensor, prompts: list[str], chosen: Sampling) -> torch.Tensor:
    """One clip for every prompt (B, F, C, H, W), all from the same picture and the same noise."""
    count, dtype = len(prompts), model.unet.dtype
    picture = picture_CHW.unsqueeze(0).to(dtype)
    start = model.vae.encode(picture).latent_dist.mode() * model.vae.config.scaling_factor
    planes = image_latents(start, chosen.frames).expand(count, -1, -1, -1, -1)
    states = text_states(model.text_encoder, tokenize(model.tokenizer, prompts))
    embeds = embed_pictures(model.image_encoder, picture).unsqueeze(1).expand(count, -1, -1)
    generator = torch.Generator().manual_seed(chosen.seed)
    noise = torch.randn(1, *planes.shape[1:], generator=generator).to(dtype)
    latents = noise.expand(count, -1, -1, -1, -1)
    if chosen.guidance > 1:
        negative = text_states(model.text_encoder, tokenize(model.tokenizer, [chosen.negative_prompt] * count))
        states = torch.cat([negative, states])
        embeds = torch.cat([torch.zeros_like(embeds), embeds])
        planes = torch.cat([planes, planes])
    model.scheduler.set_timesteps(chosen.steps)
    for step in model.scheduler.timesteps:
        predicted = _predict(model.unet, latents, step, planes, states, embeds, chosen)
        latents = model.scheduler.step(predicted, step, latents).prev_sample
    frames = latents.transpose(1, 2).flatten(0, 1) / model.vae.config.scaling_factor
    decoded = torch.cat([model.vae.decode(part).sample for part in frames.split(chosen.frames)])
    return decoded.unflatten(0, (count, chosen.frames)).float().clamp(-1, 1)


def _predict(
    unet: I2VGenXLUNet,
    latents: torch.Tensor,
    step: torch.Tensor,
    planes: torch.Tensor,
    states: torch.Tensor,
    embeds: torch.Tensor,
    chosen: Sampling,
) -> torch.Tensor:
    guided = chosen.guidance > 1
    both = torch.cat([latents, latents]) if guided else latents
    predicted = unet(
        both,
        step,
        fps=torch.full((len(both),), chosen.fps),
        image_latents=planes,
        image_embeddings=embeds,
        encoder_hidden_states=states,
        return_dict=False,
    )[0]
    if not guided:
        return predicted
    without, wanted = predicted.chunk(2)
    return without + chosen.guidance * (wanted - without)
