"""Initial noise that depends on the seed alone, not on the device or the number of frames.

Shape legend: C latent channels, T latent frames, H/W latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..families import LatentSize


def initial_noise(size: LatentSize, seed: int) -> Tensor:
    """Draw standard normal noise (1, C, T, H, W) in fp32 on the CPU, frame by frame: frame i is the same for any T."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, size.channels, size.latent_height, size.latent_width)
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(size.latent_frames)], dim=2)
