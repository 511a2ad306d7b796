"""The image autoencoder (AutoencoderKL) that several families share, which encodes and decodes frames one by one.

Shape legend: F frames, C latent channels, h/w latent size, H/W pixel size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import decoding
from ..decoding import TilingSettings
from ..memory.meter import host_memory
from ..placement.offload import empty_on_host
from .base import Placed


def wants_full_precision(config: Mapping[str, Any]) -> bool:
    """Whether the config asks for fp32 (`force_upcast`); a config without the key does not."""
    return bool(config.get("force_upcast", False))


def scaling_factor(config: Mapping[str, Any]) -> float:
    """Return the factor that latents are multiplied by for the denoiser; by default Stable Diffusion's."""
    return float(config.get("scaling_factor", 0.18215))


def chunk_sizes(frames: int, max_useful: int) -> list[int]:
    """Return the numbers of frames to decode at once that a plan may choose: `max_useful` at most, halved down to 1."""
    sizes = [max(1, min(frames, max_useful))]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def centred(picture_13HW: Tensor) -> Tensor:
    """Return a picture in 0…1 as one in -1…1, in host memory."""
    with host_memory():
        return picture_13HW * 2 - 1


def encode_mode(vae: Placed, picture_13HW: Tensor, tiling: TilingSettings, on_chunk: Callable[[], None]) -> Tensor:
    """Return the unscaled latents (1, C, h, w), in fp32, of a picture in -1…1 in host memory.

    They are the mode of the posterior, not a sample, so that the same picture always gives the same latents.
    """
    pixels_13HW = torch.empty_like(picture_13HW, device=vae.device, dtype=vae.dtype).copy_(picture_13HW)
    if tiling.by_layer:
        mode_1Chw = decoding.encode_mode(vae.module, pixels_13HW, tiling, runner=vae.runner, on_chunk=on_chunk)
    else:
        mode_1Chw = vae.module.encode(pixels_13HW).latent_dist.mode()
    return mode_1Chw.float()


def decode(vae: Placed, samples_FChw: Tensor, tiling: TilingSettings, on_chunk: Callable[[], None]) -> Iterator[Tensor]:
    """Yield decoded chunks (f, H, W, 3) of unscaled latents, in 0…1, in fp32, in host memory."""
    compression = 2 ** (len(vae.module.config.block_out_channels) - 1)
    for start in range(0, len(samples_FChw), tiling.chunk_size):
        on_chunk()
        chunk_fChw = samples_FChw[start : start + tiling.chunk_size]
        on_device_fChw = chunk_fChw.to(vae.device, vae.dtype)
        height, width = (side * compression for side in chunk_fChw.shape[2:])
        frames_fHW3 = empty_on_host((len(chunk_fChw), height, width, 3), torch.float32, vae.device)
        if tiling.by_layer:
            decoding.decode_into(vae.module, on_device_fChw, frames_fHW3, tiling, runner=vae.runner, on_chunk=on_chunk)
        else:
            frames_fHW3.copy_(vae.module.decode(on_device_fChw).sample.permute(0, 2, 3, 1))
        yield frames_fHW3.mul_(0.5).add_(0.5).clamp_(0, 1)
