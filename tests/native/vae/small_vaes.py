"""Core's autoencoder classes at small sizes, with random weights, inside core's own `VAE`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class VAECase:
    """An autoencoder class, and the arguments that make it small."""

    module: str
    """Core's module in which `VAE` finds the class."""
    kind: str
    """Name of the class there."""
    arguments: Mapping[str, Any]
    latent_shape: tuple[int, ...]
    downscale: int

    def vae(self, dtype: torch.dtype = torch.float32) -> Any:
        """Core's `VAE` as its loaders make it from a file, with weights with which every layer matters."""
        module = importlib.import_module(self.module)
        kind = getattr(module, self.kind)
        generator = torch.Generator().manual_seed(0)
        shapes = kind(**self.arguments).state_dict()
        weights = {name: _random_weight(name, it.shape, generator) for name, it in shapes.items()}
        # Core takes some sizes from the file, and has others built in.
        with mock.patch.object(module, self.kind, side_effect=lambda **_: kind(**self.arguments)):
            return importlib.import_module("comfy.sd").VAE(sd=weights, device=torch.device("cpu"), dtype=dtype)


def _random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return values * 0.05
    return values / math.sqrt(shape[1:].numel()) if name.endswith("weight") else 1 + values * 0.05


_WAN = {
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}
_HUNYUAN = {
    "block_out_channels": [8, 16, 16, 32, 64],
    "in_channels": 3,
    "out_channels": 3,
    "num_res_blocks": 1,
    "ffactor_spatial": 16,
    "ffactor_temporal": 4,
    "z_channels": 32,
}
CASES = {
    "wan-2.1": VAECase(
        module="comfy.ldm.wan.vae",
        kind="WanVAE",
        arguments={"dim": 8, "z_dim": 16, "image_channels": 3, "conv_out_channels": 3, **_WAN},
        latent_shape=(1, 16, 4, 5, 6),
        downscale=8,
    ),
    "wan-2.2": VAECase(
        module="comfy.ldm.wan.vae2_2",
        kind="WanVAE",
        arguments={"dim": 8, "dec_dim": 8, "z_dim": 48, **_WAN},
        latent_shape=(1, 48, 3, 5, 4),
        downscale=16,
    ),
    "hunyuan-video-1.5": VAECase(
        module="comfy.sd",
        kind="AutoencodingEngine",
        arguments={
            "regularizer_config": {"target": "comfy.ldm.models.autoencoder.EmptyRegularizer"},
            "encoder_config": {"target": "comfy.ldm.hunyuan_video.vae_refiner.Encoder", "params": _HUNYUAN},
            "decoder_config": {"target": "comfy.ldm.hunyuan_video.vae_refiner.Decoder", "params": _HUNYUAN},
        },
        latent_shape=(1, 32, 4, 3, 5),
        downscale=16,
    ),
}
