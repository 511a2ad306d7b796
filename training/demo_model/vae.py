"""The picture codec: an AutoencoderKL of factor 8, trained on single pictures.

Shapes: ``pictures_BCHW`` in [-1, 1], ``latents_BCHW`` with unit standard deviation, so scaling_factor is 1.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from tqdm import tqdm

from training.demo_model.muon import MuonAdamW
from training.demo_model.scenes import still_scene
from training.demo_model.schedule import warm_cosine
from training.demo_model.settings import Settings, VaeSettings
from training.demo_model.threads import ThreadTuner

log = logging.getLogger(__name__)


def build_vae(settings: VaeSettings, size: int) -> AutoencoderKL:
    levels = len(settings.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=settings.channels,
        layers_per_block=1,
        latent_channels=settings.latent_channels,
        norm_num_groups=settings.groups,
        sample_size=size,
        scaling_factor=1.0,
    )


def train_vae(settings: Settings) -> AutoencoderKL:
    """Train a codec whose latents have zero mean and unit deviation."""
    vae_settings, size = settings.vae, settings.clip.size
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    pool = _draw_pool(rng, vae_settings.pool, size)
    vae = build_vae(vae_settings, size)
    optimizer = MuonAdamW(vae, vae_settings.learning_rate)
    rate = warm_cosine(vae_settings.steps)
    threads = ThreadTuner()
    bar = tqdm(range(vae_settings.steps), desc="VAE", unit="step")
    for step in bar:
        pictures = _unpack(pool[rng.integers(len(pool), size=vae_settings.batch)])
        loss, mse = _loss(vae, pictures, vae_settings.kl_weight)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step(rate(step))
        threads.tick()
        if step % 50 == 0:
            bar.set_postfix(psnr=f"{_psnr(mse):.1f} dB")
    vae.eval()
    normalise_latents(vae, _unpack(pool[:512]))
    held_out = _unpack(_draw_pool(np.random.default_rng(settings.seed + 1), 64, size))
    log.info("VAE: %.1f dB on 64 held-out pictures", reconstruction_psnr(vae, held_out))
    return vae


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pictures_BCHW: torch.Tensor) -> None:
    """Fold the latents' mean and deviation into the two 1×1 convolutions beside them."""
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures_BCHW.split(32)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    into, out_of = vae.quant_conv, vae.post_quant_conv
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean
    out_of.weight *= std.view(1, -1, 1, 1)
    into.weight[:channels] /= std.view(-1, 1, 1, 1)
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pictures_BCHW: torch.Tensor) -> float:
    """Return the mean over pictures, in dB."""
    decoded = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in pictures_BCHW.split(32)]
    errors = (torch.cat(decoded).clamp(-1, 1) - pictures_BCHW).square().mean((1, 2, 3))
    return float(np.mean([_psnr(float(error)) for error in errors]))


def _loss(vae: AutoencoderKL, pictures_BCHW: torch.Tensor, kl_weight: float) -> tuple[torch.Tensor, float]:
    # bfloat16 halves the time of the convolutions; the weights stay in float32.
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pictures_BCHW).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    error = decoded.float() - pictures_BCHW
    mse = error.square().mean()
    kl = posterior.kl().float().mean() / posterior.mean[0].numel()
    return mse + 0.1 * error.abs().mean() + kl_weight * kl, float(mse.detach())


def _draw_pool(rng: np.random.Generator, count: int, size: int) -> torch.Tensor:
    """Draw pictures as bytes (count, 3, size, size), kept because drawing them for each step would cost more."""
    pool = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for index in tqdm(range(count), desc="pictures", unit="picture"):
        pool[index] = ((still_scene(rng).picture(size) + 1) * 127.5).round().byte()
    return pool


def _unpack(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.float() / 127.5 - 1


def _psnr(mse: float) -> float:
    """Return the PSNR for an error between values in [-1, 1], a range of 2."""
    return 10 * float(np.log10(4 / max(mse, 1e-12)))
