"""A rough picture of latents without the decoder: one linear map from latent channels to colours.

The map is fitted to the very picture that is being animated, whose latents are known, so that it suits any
autoencoder without constants of its own.

Shape legend: C latent channels, T latent frames, h/w latent size.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .pictures import to_tensor

# Keeps the fit defined for pictures of one colour; small beside latents of unit variance.
_RIDGE = 1e-2


def fit_preview(latents_1Chw: Tensor, picture: Image.Image) -> Tensor:
    """Least-squares factors (C + 1, 3) from latents to the picture's colours at latent size."""
    height, width = latents_1Chw.shape[-2:]
    small = picture.resize((width, height), resample=Image.Resampling.BOX)
    colours = to_tensor(small)[0].flatten(1).T.double()
    latents = _with_ones(latents_1Chw[0].flatten(1).T.double().cpu())
    gram = latents.T @ latents + _RIDGE * torch.eye(latents.shape[1], dtype=torch.float64)
    linalg: Any = torch.linalg
    return linalg.solve(gram, latents.T @ colours).float()


def preview_frames(latents_1CThw: Tensor, factors: Tensor) -> Tensor:
    """Colours (T, h, w, 3) in 0…1 on the CPU."""
    latents_ThwC = latents_1CThw[0].permute(1, 2, 3, 0).float().cpu()
    return (_with_ones(latents_ThwC) @ factors).clamp(0, 1)


def _with_ones(values: Tensor) -> Tensor:
    return torch.cat([values, values.new_ones(*values.shape[:-1], 1)], dim=-1)
