"""Small Kandinsky 5 models."""

from __future__ import annotations

from typing import Any

import torch
from comfy_host.model_case import ModelCase

LITE = {
    "image_model": "kandinsky5",
    "model_dim": 64,
    "axes_dims": (4, 6, 6),
    "time_dim": 32,
    "ff_dim": 128,
    "in_text_dim": 48,
    "in_text_dim2": 24,
    "visual_embed_dim": 132,
    "num_text_blocks": 2,
    "num_visual_blocks": 3,
}
PRO = {**LITE, "axes_dims": (8, 12, 12), "num_text_blocks": 4}
IMAGE = {**LITE, "rope_scale_factor": (1.0, 1.0, 1.0), "visual_embed_dim": 64}


def _text(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    return [torch.randn(1, 20, 48, generator=generator), {"pooled_output": torch.randn(1, 24, generator=generator)}]


def _start_image(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    """Conditioning as `Kandinsky5ImageToVideo` makes it: the first latent frame is known."""
    mask = torch.ones(1, 1, *shape[2:])
    mask[:, :, :1] = 0.0
    embedding, options = _text(generator, shape)
    image = torch.randn(*shape[:2], 1, *shape[3:], generator=generator)
    return [embedding, {**options, "time_dim_replace": image, "concat_mask": mask}]


def _case(config: dict[str, Any], conditioning: Any = _text) -> ModelCase:
    return ModelCase(
        supported_model="Kandinsky5", config=config, latent_shape=(1, 16, 3, 16, 24), conditioning=conditioning
    )


CASES = {
    "lite-t2v": _case(LITE),
    "pro-i2v": _case(PRO, _start_image),
    "image": ModelCase(
        supported_model="Kandinsky5Image", config=IMAGE, latent_shape=(1, 16, 32, 40), conditioning=_text
    ),
}
