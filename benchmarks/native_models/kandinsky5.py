"""Kandinsky 5 Lite and Pro at their real size."""

from __future__ import annotations

from typing import Any

import torch
from comfy_host.model_case import ModelCase

LITE = {
    "image_model": "kandinsky5",
    "model_dim": 1792,
    "axes_dims": (16, 24, 24),
    "time_dim": 512,
    "ff_dim": 7168,
    "visual_embed_dim": 132,
    "num_text_blocks": 2,
    "num_visual_blocks": 32,
}
PRO = {
    **LITE,
    "model_dim": 4096,
    "axes_dims": (32, 48, 48),
    "time_dim": 1024,
    "ff_dim": 16384,
    "num_text_blocks": 4,
    "num_visual_blocks": 60,
}


def _start_image(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    mask = torch.ones(1, 1, *shape[2:])
    mask[:, :, :1] = 0.0
    options = {
        "pooled_output": torch.zeros(1, 768),
        "time_dim_replace": torch.zeros(*shape[:2], 1, *shape[3:]),
        "concat_mask": mask,
    }
    return [torch.randn(1, 256, 3584, generator=generator), options]


def _case(config: dict[str, Any], *space: int) -> ModelCase:
    return ModelCase(
        supported_model="Kandinsky5", config=config, latent_shape=(1, 16, *space), conditioning=_start_image
    )


CASES = [
    ("Kandinsky 5 Lite I2V", "768×512×121", _case(LITE, 31, 64, 96)),
    ("Kandinsky 5 Lite I2V", "768×512×241", _case(LITE, 61, 64, 96)),
    ("Kandinsky 5 Pro I2V", "768×512×121", _case(PRO, 31, 64, 96)),
    ("Kandinsky 5 Pro I2V", "1280×768×121", _case(PRO, 31, 96, 160)),
    ("Kandinsky 5 Pro I2V", "1280×768×241", _case(PRO, 61, 96, 160)),
]
