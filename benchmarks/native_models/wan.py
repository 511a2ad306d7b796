"""The Wan family at its real sizes: those of core's templates, or 1280×720."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
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
    "out_dim": 16,
}
W14B = {**CONFIG, "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
A14B = {**W14B, "model_type": "t2v", "in_dim": 36}
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
Shape = tuple[int, ...]


def _zeros(*shape: int) -> torch.Tensor:
    """Zeros of a shape, which take no memory."""
    return torch.zeros(()).expand(shape)


def _clip() -> Any:
    """An image embedding, as core's CLIP vision puts it out."""
    return SimpleNamespace(penultimate_hidden_states=_zeros(1, 257, 1280))


def _text(_shape: Shape) -> dict[str, Any]:
    return {}


def _start_image(shape: Shape) -> dict[str, Any]:
    return {"concat_latent_image": torch.zeros(shape), "concat_mask": _zeros(1, 1, *shape[2:])}


def _start_image_and_clip(shape: Shape) -> dict[str, Any]:
    return {**_start_image(shape), "clip_vision_output": _clip()}


def _fun_control(shape: Shape) -> dict[str, Any]:
    return {
        "concat_latent_image": torch.zeros(1, 32, *shape[2:]),
        "concat_mask": _zeros(1, 4, *shape[2:]),
        "concat_mask_index": 16,
        "reference_latents": [_zeros(1, 16, 1, *shape[3:])],
    }


def _camera(shape: Shape) -> dict[str, Any]:
    *_, frames, height, width = shape
    return {**_start_image(shape), "camera_conditions": _zeros(1, 24, frames, 8 * height, 8 * width)}


def _vace(shape: Shape) -> dict[str, Any]:
    return {
        "vace_frames": [_zeros(1, 32, *shape[2:])],
        "vace_mask": [_zeros(1, 64, *shape[2:])],
        "vace_strength": [1.0],
    }


def _sound(shape: Shape) -> dict[str, Any]:
    """Sound, a reference image, and the frames before, as the node that extends a clip has them."""
    *_, frames, height, width = shape
    return {
        "audio_embed": _zeros(1, 25, 1024, 4 * frames),
        "reference_latents": [_zeros(1, 16, 1, height, width)],
        "reference_motion": _zeros(1, 16, 19, height, width),
        "control_video": _zeros(*shape),
    }


def _humo(shape: Shape) -> dict[str, Any]:
    *_, frames, height, width = shape
    return {
        "audio_embed": _zeros(1, frames, 8, 5, 1280),
        "reference_latents": [_zeros(1, 16, 1, height, width)],
    }


def _animate(shape: Shape) -> dict[str, Any]:
    """A reference image, the frame before the clip's own, with the video of a pose and of a face."""
    *_, frames, height, width = shape
    return {
        **_start_image_and_clip(shape),
        "pose_video_latent": _zeros(1, 16, frames - 1, height, width),
        "face_video_pixels": _zeros(1, 3, 4 * (frames - 1) - 3, 512, 512),
    }


def _scail(shape: Shape) -> dict[str, Any]:
    *_, frames, height, width = shape
    return {
        "clip_vision_output": _clip(),
        "reference_latents": [_zeros(1, 16, 1, height, width)],
        "pose_video_latent": _zeros(1, 16, frames, height // 2, width // 2),
    }


def _scail_2(shape: Shape) -> dict[str, Any]:
    *_, frames, height, width = shape
    return {
        **_scail(shape),
        "ref_mask_flag": True,
        "driving_mask_28ch": _zeros(1, frames, 28, height // 2, width // 2),
        "ref_mask_28ch": _zeros(1, frames + 1, 28, height, width),
    }


def _dancer(shape: Shape) -> dict[str, Any]:
    return {
        **_start_image_and_clip(shape),
        "clip_vision_output_ref": _clip(),
        "audio_embed": _zeros(1, 4 * shape[2] - 3, 35),
        "fps": 30,
    }


def _source_video(shape: Shape) -> dict[str, Any]:
    return {"context_latents": [_zeros(*shape)]}


def _case(
    supported_model: str, config: dict[str, Any], options: Callable[[Shape], dict[str, Any]], latent_shape: Shape
) -> ModelCase:
    def conditioning(generator: torch.Generator, shape: Shape) -> list[Any]:
        return [torch.randn(1, 512, 4096, generator=generator), options(shape)]

    return ModelCase(
        supported_model=supported_model, config=config, latent_shape=latent_shape, conditioning=conditioning
    )


I2V = {**A14B, "model_type": "i2v"}
CONTROL = {**A14B, "in_dim": 52, "in_dim_ref_conv": 16}
CAMERA = {**A14B, "model_type": "camera_2.2", "in_dim_control_adapter": 24}
VACE = {**W14B, "model_type": "vace", "in_dim": 16, "vace_layers": 8, "vace_in_dim": 96}
SOUND = {**W14B, "model_type": "s2v", "in_dim": 16}
HUMO = {**W14B, "model_type": "humo", "in_dim": 36}
ANIMATE = {**W14B, "model_type": "animate", "in_dim": 36}
SCAIL = {**W14B, "model_type": "scail", "in_dim": 20}
SCAIL_2 = {**W14B, "model_type": "scail2", "in_dim": 20}
DANCER = {**W14B, "model_type": "wandancer", "in_dim": 36}

CASES = [
    ("Wan 2.2 A14B", "832×480×81", _case("WAN21_T2V", A14B, _start_image, (1, 16, 21, 60, 104))),
    ("Wan 2.2 A14B", "1280×720×81", _case("WAN21_T2V", A14B, _start_image, (1, 16, 21, 90, 160))),
    ("Wan 2.1 I2V 14B", "1280×720×81", _case("WAN21_I2V", I2V, _start_image_and_clip, (1, 16, 21, 90, 160))),
    ("Wan 2.2 TI2V-5B", "1280×704×121", _case("WAN22_T2V", TI2V_5B, _text, (1, 48, 31, 44, 80))),
    ("Wan 2.2 Fun Control", "1280×720×81", _case("WAN21_T2V", CONTROL, _fun_control, (1, 16, 21, 90, 160))),
    ("Wan 2.2 Fun Camera", "832×480×81", _case("WAN22_Camera", CAMERA, _camera, (1, 16, 21, 60, 104))),
    ("Wan 2.1 VACE 14B", "1280×720×81", _case("WAN21_Vace", VACE, _vace, (1, 16, 21, 90, 160))),
    ("Wan 2.2 S2V 14B", "1280×720×77", _case("WAN22_S2V", SOUND, _sound, (1, 16, 20, 90, 160))),
    ("Wan 2.1 HuMo 17B", "832×480×97", _case("WAN21_HuMo", HUMO, _humo, (1, 16, 25, 60, 104))),
    ("Wan 2.2 Animate", "1280×720×77", _case("WAN22_Animate", ANIMATE, _animate, (1, 16, 21, 90, 160))),
    ("Wan 2.2 Animate", "832×480×77", _case("WAN22_Animate", ANIMATE, _animate, (1, 16, 21, 60, 104))),
    ("Wan 2.1 SCAIL", "512×896×81", _case("WAN21_SCAIL", SCAIL, _scail, (1, 16, 21, 112, 64))),
    ("Wan 2.1 SCAIL-2", "512×896×81", _case("WAN21_SCAIL2", SCAIL_2, _scail_2, (1, 16, 21, 112, 64))),
    ("WanDancer 14B", "480×832×149", _case("WAN22_WanDancer", DANCER, _dancer, (1, 16, 38, 104, 60))),
    ("Wan 2.1 Bernini", "832×480×81", _case("WAN21_T2V", {**A14B, "in_dim": 16}, _source_video, (1, 16, 21, 60, 104))),
]
