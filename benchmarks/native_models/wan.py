"""Wan 2.1 and 2.2 at their real size."""

from __future__ import annotations

from typing import Any

import torch
from comfy_host.model_case import ModelCase

CONFIG = {
    "image_model": "wan2.1",
    "patch_size": (1, 2, 2),
    "text_len": 512,
    "freq_dim": 256,
    "text_dim": 4096,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}
A14B = {
    **CONFIG,
    "model_type": "t2v",
    "dim": 5120,
    "ffn_dim": 13824,
    "num_heads": 40,
    "num_layers": 40,
    "in_dim": 36,
    "out_dim": 16,
}
TI2V_5B = {
    **CONFIG,
    "model_type": "t2v",
    "dim": 3072,
    "ffn_dim": 14336,
    "num_heads": 24,
    "num_layers": 30,
    "in_dim": 48,
    "out_dim": 48,
}


def _start_image(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    options = {"concat_latent_image": torch.zeros(shape), "concat_mask": torch.ones(1, 1, *shape[2:])}
    return [torch.randn(1, 512, 4096, generator=generator), options]


def _text(generator: torch.Generator, _shape: tuple[int, ...]) -> list[Any]:
    return [torch.randn(1, 512, 4096, generator=generator), {}]


def _case(supported_model: str, config: dict[str, Any], conditioning: Any, latent_shape: tuple[int, ...]) -> ModelCase:
    return ModelCase(
        supported_model=supported_model, config=config, latent_shape=latent_shape, conditioning=conditioning
    )


A14B_480P = _case("WAN21_T2V", A14B, _start_image, (1, 16, 21, 60, 104))
A14B_720P = _case("WAN21_T2V", A14B, _start_image, (1, 16, 21, 90, 160))
I2V_720P = _case("WAN21_I2V", {**A14B, "model_type": "i2v"}, _start_image, (1, 16, 21, 90, 160))
TI2V_704P = _case("WAN22_T2V", TI2V_5B, _text, (1, 48, 31, 44, 80))

CASES = [
    ("Wan 2.2 A14B", "832×480×81", A14B_480P),
    ("Wan 2.2 A14B", "1280×720×81", A14B_720P),
    ("Wan 2.1 I2V 14B", "1280×720×81", I2V_720P),
    ("Wan 2.2 TI2V-5B", "1280×704×121", TI2V_704P),
]
