"""HunyuanVideo 1.0 and 1.5 at their real size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from comfy_host.model_case import ModelCase

CONFIG = {
    "image_model": "hunyuan_video",
    "axes_dim": [16, 56, 56],
    "meanflow": False,
    "mlp_ratio": 4.0,
    "theta": 256,
    "qkv_bias": True,
}
V1_I2V = {
    **CONFIG,
    "in_channels": 33,
    "patch_size": [1, 2, 2],
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "num_heads": 24,
    "depth": 20,
    "depth_single_blocks": 40,
    "byt5": False,
    "guidance_embed": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
V1_5 = {
    **CONFIG,
    "in_channels": 65,
    "patch_size": [1, 1, 1],
    "out_channels": 32,
    "vec_in_dim": None,
    "context_in_dim": 3584,
    "hidden_size": 2048,
    "num_heads": 16,
    "depth": 54,
    "depth_single_blocks": 0,
    "byt5": True,
    "guidance_embed": False,
    "use_cond_type_embedding": True,
    "vision_in_dim": 1152,
    "meanflow_sum": True,
}


def _start_image(shape: tuple[int, ...]) -> dict[str, Any]:
    return {"concat_latent_image": torch.zeros(shape), "concat_mask": torch.ones(1, 1, *shape[2:])}


def _image_in_prompt(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    """A prompt of 1.0, in which the start image takes 144 tokens beside the text's 256."""
    options = {
        "pooled_output": torch.randn(1, 768, generator=generator),
        "attention_mask": torch.ones(1, 400, dtype=torch.long),
    }
    return [torch.randn(1, 400, 4096, generator=generator), {**options, **_start_image(shape)}]


def _image_beside_prompt(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    """A prompt of 1.5: text, words to write in the picture, and the start image as a vision model sees it."""
    options = {
        "pooled_output": None,
        "conditioning_byt5small": torch.randn(1, 64, 1472, generator=generator),
        "clip_vision_output": SimpleNamespace(last_hidden_state=torch.randn(1, 729, 1152, generator=generator)),
    }
    return [torch.randn(1, 512, 3584, generator=generator), {**options, **_start_image(shape)}]


I2V_720P = ModelCase(
    supported_model="HunyuanVideoI2V",
    config=V1_I2V,
    latent_shape=(1, 16, 33, 90, 160),
    conditioning=_image_in_prompt,
)
V1_5_I2V_720P = ModelCase(
    supported_model="HunyuanVideo15",
    config=V1_5,
    latent_shape=(1, 32, 31, 45, 80),
    conditioning=_image_beside_prompt,
)

CASES = [
    ("HunyuanVideo I2V", "1280×720×129", I2V_720P),
    ("HunyuanVideo 1.5 I2V", "1280×720×121", V1_5_I2V_720P),
]
