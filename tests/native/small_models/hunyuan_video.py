"""Small models of HunyuanVideo's class: 1.0 with its ways from image to video, SkyReels, 1.5 and its super-resolution,
HunyuanImage.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from comfy_host.model_case import ModelCase

CONFIG = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "patch_size": [1, 2, 2],
    "out_channels": 16,
    "vec_in_dim": 768,
    "axes_dim": [4, 6, 6],
    "meanflow": False,
    "context_in_dim": 64,
    "hidden_size": 64,
    "mlp_ratio": 4.0,
    "num_heads": 4,
    "depth": 3,
    "depth_single_blocks": 3,
    "theta": 256,
    "qkv_bias": True,
    "byt5": False,
    "guidance_embed": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
CONFIG_15 = {
    **CONFIG,
    "in_channels": 65,
    "patch_size": [1, 1, 1],
    "out_channels": 32,
    "vec_in_dim": None,
    "depth_single_blocks": 0,
    "byt5": True,
    "use_cond_type_embedding": True,
    "vision_in_dim": 1152,
    "meanflow_sum": True,
}
SHAPE = (1, 16, 3, 16, 24)
SHAPE_15 = (1, 32, 3, 8, 12)


def _prompt(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, Any]]:
    return torch.randn(1, 20, 64, generator=generator), {"pooled_output": torch.randn(1, 768, generator=generator)}


def _text(generator: torch.Generator, _shape: tuple[int, ...]) -> list[Any]:
    return [*_prompt(generator)]


def _first_frame_concatenated(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    embedding, options = _prompt(generator)
    mask = torch.ones(1, 1, *shape[2:])
    mask[:, :, 0] = 0
    image = torch.randn(shape, generator=generator)
    return [embedding, {**options, "concat_latent_image": image, "concat_mask": mask}]


def _first_frame_replaced(generator: torch.Generator, _shape: tuple[int, ...]) -> list[Any]:
    """A time step of its own for the first latent frame: the modulation has two rows."""
    embedding, options = _prompt(generator)
    return [embedding, {**options, "guiding_frame_index": 0}]


def _with_byt5(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    embedding, options = _first_frame_concatenated(generator, shape)
    return [embedding, {**options, "conditioning_byt5small": torch.randn(1, 6, 1472, generator=generator)}]


def _with_vision(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    embedding, options = _with_byt5(generator, shape)
    vision = SimpleNamespace(last_hidden_state=torch.randn(1, 9, 1152, generator=generator))
    return [embedding, {**options, "clip_vision_output": vision}]


def _picture(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    embedding, options = _prompt(generator)
    return [embedding, {**options, "conditioning_byt5small": torch.randn(1, 6, 1472, generator=generator)}]


def _low_resolution(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    embedding, options = _with_vision(generator, shape)
    batch, channels, *space = shape
    image = torch.randn(batch, 2 * channels + 2, *space, generator=generator)
    return [embedding, {**options, "concat_latent_image": image, "noise_augmentation": 0.7}]


def _case(supported_model: str, conditioning: Any = _text, **config: Any) -> ModelCase:
    return ModelCase(
        supported_model=supported_model, config={**CONFIG, **config}, latent_shape=SHAPE, conditioning=conditioning
    )


def _case_15(supported_model: str, conditioning: Any, **config: Any) -> ModelCase:
    return ModelCase(
        supported_model=supported_model,
        config={**CONFIG_15, **config},
        latent_shape=SHAPE_15,
        conditioning=conditioning,
    )


CASES = {
    "t2v": _case("HunyuanVideo", guidance_embed=True),
    "i2v-concat": _case("HunyuanVideoI2V", _first_frame_concatenated, in_channels=33),
    "i2v-replace": _case("HunyuanVideo", _first_frame_replaced, guidance_embed=True),
    "skyreels": _case("HunyuanVideoSkyreelsI2V", _first_frame_concatenated, in_channels=32),
    "1.5-t2v": _case_15("HunyuanVideo15", _with_byt5),
    "1.5-i2v": _case_15("HunyuanVideo15", _with_vision),
    "image": replace(
        _case_15("HunyuanImage21", _picture, in_channels=64, patch_size=[1, 1], out_channels=64, axes_dim=[8, 8]),
        latent_shape=(1, 64, 12, 24),
    ),
    "1.5-upscale": _case_15("HunyuanVideo15_SR_Distilled", _low_resolution, in_channels=98, meanflow=True),
}
