"""Core's autoencoder classes at small sizes, with random weights, inside core's own `VAE`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class VAECase:
    """An autoencoder class by its place in core, and the sizes that make it small."""

    module: str
    sizes: Mapping[str, Any]
    latent_shape: tuple[int, ...]
    downscale: int

    def vae(self, dtype: torch.dtype = torch.float32) -> Any:
        """Core's `VAE` as its loaders make it from a file, with weights with which every layer matters."""
        module = importlib.import_module(self.module)
        kind: Callable[..., Any] = module.WanVAE
        generator = torch.Generator().manual_seed(0)
        shapes = kind(**self.sizes).state_dict()
        weights = {name: _random_weight(name, it.shape, generator) for name, it in shapes.items()}
        # Core takes some sizes from the file, and has others built in.
        with mock.patch.object(module, "WanVAE", side_effect=lambda **_: kind(**self.sizes)):
            return importlib.import_module("comfy.sd").VAE(sd=weights, device=torch.device("cpu"), dtype=dtype)


def _random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return values * 0.05
    return values / math.sqrt(shape[1:].numel()) if name.endswith("weight") else 1 + values * 0.05


_SIZES = {
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}
CASES = {
    "wan-2.1": VAECase(
        module="comfy.ldm.wan.vae",
        sizes={"dim": 8, "z_dim": 16, "image_channels": 3, "conv_out_channels": 3, **_SIZES},
        latent_shape=(1, 16, 4, 5, 6),
        downscale=8,
    ),
    "wan-2.2": VAECase(
        module="comfy.ldm.wan.vae2_2",
        sizes={"dim": 8, "dec_dim": 8, "z_dim": 48, **_SIZES},
        latent_shape=(1, 48, 3, 5, 4),
        downscale=16,
    ),
}
