"""Previews of latents without the decoder, by a linear map from latent channels to colours.

The map is read from the model's folder, where it has one (`scripts/fit_preview.py` makes it). Else it is fitted to the
picture that is being animated, whose latents are known, so it works with any autoencoder and needs no constants.

Shape legend: C latent channels, T latent frames, h/w latent size, N pixels in latent space.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from .pictures import to_tensor

logger = logging.getLogger(__name__)

FACTORS_FILE = "preview_factors.json"
"""File in a model's folder whose `factors` has a row of red, green and blue for each latent channel, and one for the
constant."""

# Keeps the fit defined for pictures of one colour; small beside latents of unit variance.
_RIDGE = 1e-2

_SD1_AUTOENCODER = {
    "in_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
"""Config of Stable Diffusion 1's autoencoder. Fine-tuned ones have the same and keep its latents; others differ in size
or in scale (Stable Diffusion XL's has 0.13025)."""


def preview_factors(folder: Path, latents_1Chw: Tensor, picture: Image.Image) -> Tensor:
    """Return factors (C + 1, 3) from a model's latents to colours: its folder's, or those fitted to this picture."""
    own = read_factors(folder / FACTORS_FILE, latents_1Chw.shape[1])
    return fit_preview(latents_1Chw, picture) if own is None else own


def fit_preview(latents_1Chw: Tensor, picture: Image.Image) -> Tensor:
    """Return least-squares factors (C + 1, 3) for one picture."""
    return fit_factors([(latents_1Chw, picture)])


def fit_factors(pairs: Iterable[tuple[Tensor, Image.Image]]) -> Tensor:
    """Return least-squares factors (C + 1, 3) from latents (1, C, h, w) to the colours of their pictures."""
    gram: Tensor | float = 0.0
    moment: Tensor | float = 0.0
    for latents_1Chw, picture in pairs:
        latents_NC = _with_ones(latents_1Chw[0].flatten(1).T.double().cpu())
        gram = gram + latents_NC.T @ latents_NC
        moment = moment + latents_NC.T @ colours_at_latent_size(latents_1Chw, picture).double()
    assert isinstance(gram, Tensor), "nothing to fit to"
    linalg: Any = torch.linalg
    return linalg.solve(gram + _RIDGE * torch.eye(len(gram), dtype=torch.float64), moment).float()


def colours_at_latent_size(latents_1Chw: Tensor, picture: Image.Image) -> Tensor:
    """Return the picture's colours (N, 3) in 0…1, one for each pixel of its latents."""
    height, width = latents_1Chw.shape[-2:]
    return to_tensor(picture.resize((width, height), resample=Image.Resampling.BOX))[0].flatten(1).T


def preview_frames(latents_1CThw: Tensor, factors: Tensor) -> Tensor:
    """Return colours (T, h, w, 3) of latents in 0…1, on the CPU."""
    latents_ThwC = latents_1CThw[0].permute(1, 2, 3, 0).float().cpu()
    return (_with_ones(latents_ThwC) @ factors).clamp(0, 1)


def write_factors(file: Path, factors: Tensor, facts: Mapping[str, Any]) -> None:
    """Write a file for a model's folder; `facts` are further JSON fields that say how the factors were made."""
    rows = [[round(float(value), 6) for value in row] for row in factors]
    file.write_text(json.dumps({**facts, "factors": rows}, indent=1) + "\n", "utf-8")


def read_factors(file: Path, channels: int) -> Tensor | None:
    """Return the factors (C + 1, 3) in a file; None if there is no file.

    A file that cannot be used is logged, and None returned: a preview is not worth failing a run for.
    """
    if not file.is_file():
        return None
    try:
        factors = torch.tensor(json.loads(file.read_text("utf-8"))["factors"], dtype=torch.float32)
        if factors.shape != (channels + 1, 3):
            raise ValueError(f"factors of shape {tuple(factors.shape)}, not {(channels + 1, 3)}")
        if not torch.isfinite(factors).all():
            raise ValueError("factors that are not finite")
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, RecursionError) as error:
        logger.warning("%s is not used, and previews are fitted to the picture: %s", file, error)
        return None
    return factors


def tiny_decoder(autoencoder_config: Mapping[str, Any]) -> str | None:
    """Return the host's name of the tiny decoder for an autoencoder's latents; None if there is none."""
    # diffusers' defaults for values that a config leaves out, which are Stable Diffusion 1's.
    config = {"in_channels": 3, "latent_channels": 4, "scaling_factor": 0.18215, **autoencoder_config}
    found = {name: config.get(name) for name in _SD1_AUTOENCODER}
    found["block_out_channels"] = tuple(cast("Sequence[int]", found["block_out_channels"] or ()))
    has_shift = any(config.get(name) for name in ("shift_factor", "latents_mean", "latents_std"))
    return "taesd_decoder" if found == _SD1_AUTOENCODER and not has_shift else None


def _with_ones(values: Tensor) -> Tensor:
    return torch.cat([values, values.new_ones(*values.shape[:-1], 1)], dim=-1)
