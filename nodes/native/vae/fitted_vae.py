"""A fitted VAE: core's own object with another decode and encode, which stay within the budget."""

from __future__ import annotations

import copy
from typing import Any

import comfy.sd
import torch

from ..services import Services
from .model import native_vae
from .passes import VAEPasses


class FittedVAE(comfy.sd.VAE):
    """Core's VAE, whose decode and encode, tiled or not, give the result of core's untiled ones."""

    original: Any
    passes: VAEPasses

    def decode(self, samples_in: torch.Tensor, vae_options: Any = None) -> torch.Tensor:
        self.throw_exception_if_invalid()
        if samples_in.ndim != 5 or vae_options:
            return super().decode(samples_in, vae_options or {})
        return self.passes.decode(self, samples_in).movedim(1, -1)

    def decode_tiled(self, samples: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if samples.ndim != 5:
            return super().decode_tiled(samples, *args, **kwargs)
        return self.decode(samples)

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        self.throw_exception_if_invalid()
        if pixel_samples.ndim not in (4, 5):
            return super().encode(pixel_samples)
        pixels = self.vae_encode_crop_pixels(pixel_samples).movedim(-1, 1)
        if pixels.ndim == 4:  # the frames of one video, or pictures
            pixels = pixels.unsqueeze(2) if self.not_video else pixels.movedim(1, 0).unsqueeze(0)
        return self.passes.encode(self, pixels)

    def encode_tiled(self, pixel_samples: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if pixel_samples.ndim not in (4, 5):
            return super().encode_tiled(pixel_samples, *args, **kwargs)
        return self.encode(pixel_samples)


def fitted_vae(vae: Any, services: Services) -> tuple[Any, str]:
    """A VAE that runs within the budget, and a line that says what it covers.

    It shares weights and patcher with the original, which stays as it is.
    """
    original = vae.original if isinstance(vae, FittedVAE) else vae
    model = getattr(original, "first_stage_model", None)
    native = None if model is None else native_vae(model)
    if native is None or type(original) is not comfy.sd.VAE or _METHODS & original.__dict__.keys():
        return vae, f"VAE: {type(model).__name__} is not known to VRAM Fit: it runs as it is, tiled where core tiles it"
    made = copy.copy(original)
    made.__class__ = FittedVAE
    made.original, made.passes = original, VAEPasses(native, original, services)
    return made, (
        f"{native.name}: decodes and encodes within the budget, also in tiled nodes, with the result of core's untiled "
        "ones; planned when the size is known"
    )


_METHODS = {"decode", "decode_tiled", "encode", "encode_tiled"}
