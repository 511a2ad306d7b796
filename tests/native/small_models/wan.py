"""Small Wan models."""

from __future__ import annotations

from typing import Any

import torch
from comfy_host.model_case import ModelCase

CONFIG = {
    "image_model": "wan2.1",
    "patch_size": (1, 2, 2),
    "text_len": 512,
    "dim": 96,
    "ffn_dim": 160,
    "freq_dim": 32,
    "text_dim": 4096,
    "out_dim": 16,
    "num_heads": 4,
    "num_layers": 3,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}


def _text(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    return [torch.randn(1, 20, 4096, generator=generator), {}]


def _vace(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    batch, _, *space = shape
    options = {
        "vace_frames": [torch.randn(batch, 32, *space, generator=generator)],
        "vace_mask": [torch.ones(batch, 64, *space)],
        "vace_strength": [0.7],
    }
    return [torch.randn(1, 20, 4096, generator=generator), options]


def _case(supported_model: str, conditioning: Any = _text, channels: int = 16, **config: Any) -> ModelCase:
    return ModelCase(
        supported_model=supported_model,
        config={**CONFIG, **config},
        latent_shape=(1, channels, 3, 16, 24),
        conditioning=conditioning,
    )


CASES = {
    "t2v": _case("WAN21_T2V", model_type="t2v", in_dim=16),
    "i2v": _case("WAN21_I2V", model_type="i2v", in_dim=36),
    "flf2v": _case("WAN21_I2V", model_type="i2v", in_dim=36, flf_pos_embed_token_number=514),
    "ti2v": _case("WAN22_T2V", channels=48, model_type="t2v", in_dim=48, out_dim=48),
    "vace": _case("WAN21_Vace", _vace, model_type="vace", in_dim=16, vace_layers=3, vace_in_dim=96),
    "camera": _case("WAN21_Camera", model_type="camera", in_dim=32, in_dim_control_adapter=24),
}
