"""The image autoencoder (AutoencoderKL) that several families share: it knows one frame at a time.

Shape legend: F frames (batch), C latent channels, h/w latent size, H/W pixel size.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .base import DecodeTile


def wants_full_precision(config: Mapping[str, Any]) -> bool:
    """Whether the config itself asks for fp32 (`force_upcast`); a config without the key does not."""
    return bool(config.get("force_upcast", False))


def encode_mode(vae: Any, picture_13HW: Tensor) -> Tensor:
    """Scaled latents (1, C, h, w) of a picture in 0…1. The posterior's mode, not a sample: the same picture always
    gives the same latents.
    """
    parameter = next(vae.parameters())
    pixels = (picture_13HW * 2 - 1).to(parameter.device, parameter.dtype)
    return vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor


def decode_frames(vae: nn.Module, samples_FChw: Tensor, tile: DecodeTile) -> Tensor:
    """Frames (F, H, W, 3) in 0…1, fp32, of unscaled latents."""
    parameter = next(vae.parameters())
    model: Any = vae
    with tiled(vae, tile):
        frames_F3HW = model.decode(samples_FChw.to(parameter.device, parameter.dtype)).sample
    frames_FHW3: Tensor = frames_F3HW.permute(0, 2, 3, 1)
    # In place on a fresh fp32 copy: one frame's worth of memory, not four.
    return frames_FHW3.to(torch.float32, copy=True).mul_(0.5).add_(0.5).clamp_(0, 1)


def decode_outline(vae: nn.Module, latent_hw: tuple[int, int], tile: DecodeTile, dtype: torch.dtype) -> Tensor:
    """What `decode_frames` holds at once for one tiled frame, with one tile decoded in place of all: for tracing."""
    model: Any = vae
    compression = 2 ** (len(model.config.block_out_channels) - 1)
    side = tile.size_pixels // compression
    stride = side - tile.overlap_pixels // compression
    rows, columns = ([min(side, length - start) for start in range(0, length, stride)] for length in latent_hw)
    device = next(vae.parameters()).device
    decoded = [
        torch.empty(1, 3, height * compression, width * compression, device=device, dtype=dtype)
        for height in rows
        for width in columns
    ]
    channels = model.config.latent_channels
    decoded[0] = model.decode(torch.empty(1, channels, rows[0], columns[0], device=device, dtype=dtype)).sample
    blended = torch.empty(1, 3, *(length * compression for length in latent_hw), device=device, dtype=dtype)
    frame = torch.empty_like(blended)
    del decoded, blended
    return frame.float()


@contextmanager
def tiled(vae: nn.Module, tile: DecodeTile) -> Generator[None]:
    """diffusers' own spatial tiling (blended borders, so approximate) while the context lasts."""
    if not tile.size_pixels:
        yield
        return
    model: Any = vae
    compression = 2 ** (len(model.config.block_out_channels) - 1)
    settings = {
        "use_tiling": True,
        "tile_sample_min_size": tile.size_pixels,
        "tile_latent_min_size": tile.size_pixels // compression,
        "tile_overlap_factor": tile.overlap_pixels / tile.size_pixels,
    }
    before = {name: getattr(model, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(model, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(model, name, value)
