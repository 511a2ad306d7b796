"""Core's autoencoder classes at small sizes, with random weights, inside core's own `VAE`."""

from __future__ import annotations

import math
from typing import Any

import torch
from comfy_host.vae_case import VAECase


def small_vae(case: VAECase, dtype: torch.dtype = torch.float32) -> Any:
    """Core's `VAE`, with numbers with which every layer matters."""
    generator = torch.Generator().manual_seed(0)

    def weight(name: str, shape: torch.Size) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            return values * 0.05
        return values / math.sqrt(shape[1:].numel()) if name.endswith("weight") else 1 + values * 0.05

    return case.vae(dtype, torch.device("cpu"), weight)


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
