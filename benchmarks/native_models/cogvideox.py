"""CogVideoX 1.0 and 1.5 at their real size."""

from __future__ import annotations

from typing import Any

import torch
from comfy_host.model_case import ModelCase

V1_5B = {
    "image_model": "cogvideox",
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "num_layers": 42,
    "patch_size": 2,
    "in_channels": 16,
    "use_learned_positional_embeddings": False,
    "use_rotary_positional_embeddings": True,
}
V1_5B_I2V = {
    **V1_5B,
    "in_channels": 32,
    "use_learned_positional_embeddings": True,
    "use_rotary_positional_embeddings": False,
}
"""As core detects it: positions are stored, so queries and keys are not rotated."""
V1_5_I2V = {**V1_5B, "patch_size_t": 2, "in_channels": 32, "ofs_embed_dim": 512}
VOID = {**V1_5B, "patch_size_t": 2, "in_channels": 48}


def _embedding(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(1, 226, 4096, generator=generator)


def _text(generator: torch.Generator, _shape: tuple[int, ...]) -> list[Any]:
    return [_embedding(generator), {}]


def _start_image(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    return [_embedding(generator), {"concat_latent_image": torch.zeros(shape)}]


def _inpaint(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    batch, channels, *space = shape
    return [_embedding(generator), {"concat_latent_image": torch.zeros(batch, 2 * channels, *space)}]


def _case(supported_model: str, config: dict[str, Any], conditioning: Any, *space: int) -> ModelCase:
    return ModelCase(
        supported_model=supported_model, config=config, latent_shape=(1, 16, *space), conditioning=conditioning
    )


CASES = [
    ("CogVideoX 5B", "720×480×49", _case("CogVideoX_T2V", V1_5B, _text, 13, 60, 90)),
    ("CogVideoX 5B I2V", "720×480×49", _case("CogVideoX_I2V", V1_5B_I2V, _start_image, 13, 60, 90)),
    ("CogVideoX 1.5 I2V", "1360×768×81", _case("CogVideoX_I2V", V1_5_I2V, _start_image, 21, 96, 170)),
    ("VOID (CogVideoX 1.5)", "672×384×117", _case("CogVideoX_Inpaint", VOID, _inpaint, 30, 48, 84)),
]
