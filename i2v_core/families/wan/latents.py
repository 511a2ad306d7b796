"""Latents of Wan's autoencoder: their normalisation, and the number of tokens that the denoiser makes of them.

Shape legend: B guidance branches, C latent channels, T latent frames, h/w latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from ..model import Architecture


def normalised(architecture: Architecture, mode_1CThw: Tensor) -> Tensor:
    """Return the autoencoder's latents, normalised for the denoiser."""
    mean, deviation = _statistics(architecture, mode_1CThw)
    return (mode_1CThw - mean) * (1 / deviation)


def denormalised(architecture: Architecture, latents_BCThw: Tensor) -> Tensor:
    """Return the denoiser's latents in the autoencoder's scale: the reverse of `normalised`."""
    mean, deviation = _statistics(architecture, latents_BCThw)
    return latents_BCThw / (1 / deviation) + mean


def _statistics(architecture: Architecture, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (1, C, 1, 1, 1) of the autoencoder's latents."""
    config: Mapping[str, Any] = architecture.config("vae")
    mean, deviation = (like.new_tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, deviation


def tokens_of_frame(latents_BCThw: Tensor, patch_size: Sequence[int]) -> int:
    """Return how many tokens the denoiser makes of a latent frame."""
    return prod(latents_BCThw.shape[3:]) // prod(patch_size[1:])
