"""Small CogVideoX models."""

from __future__ import annotations

from typing import Any

import torch
from comfy_host.model_case import ModelCase

ROTARY = {
    "image_model": "cogvideox",
    "num_attention_heads": 6,
    "attention_head_dim": 16,
    "time_embed_dim": 32,
    "text_embed_dim": 48,
    "num_layers": 3,
    "in_channels": 16,
    "use_learned_positional_embeddings": False,
    "use_rotary_positional_embeddings": True,
}
SAMPLE = {"sample_height": 16, "sample_width": 24, "sample_frames": 9}
"""The clip whose positions are stored."""
LEARNED = {
    **ROTARY,
    **SAMPLE,
    "use_learned_positional_embeddings": True,
    "use_rotary_positional_embeddings": False,
}
V1_5 = {**ROTARY, "patch_size": 2, "patch_size_t": 2}


TEXT_TOKENS = 100
"""No multiple of a chunk's 128: the first chunk lies across the border of text and image."""


def _text(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    return [torch.randn(1, TEXT_TOKENS, 48, generator=generator), {}]


def _start_image(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    embedding, _ = _text(generator, shape)
    return [embedding, {"concat_latent_image": torch.randn(shape, generator=generator)}]


def _case(supported_model: str, config: dict[str, Any], conditioning: Any, frames: int) -> ModelCase:
    return ModelCase(
        supported_model=supported_model,
        config=config,
        latent_shape=(1, 16, frames, 16, 24),
        conditioning=conditioning,
    )


CASES = {
    "t2v": _case("CogVideoX_T2V", ROTARY, _text, 3),
    "i2v": _case("CogVideoX_I2V", {**LEARNED, "in_channels": 32}, _start_image, 3),
    "v1.5-i2v": _case("CogVideoX_I2V", {**V1_5, "in_channels": 32, "ofs_embed_dim": 32}, _start_image, 5),
}
