"""Small models of the Wan family, with conditioning as core's nodes put it out."""

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
Shape = tuple[int, ...]
Random = Callable[..., torch.Tensor]
Options = Callable[[Random, Shape], dict[str, Any]]


def _text(_random: Random, _shape: Shape) -> dict[str, Any]:
    return {}


def _clip(random: Random) -> Any:
    """An image embedding as core's CLIP vision puts it out, of fewer tokens, so that blocks set the peak."""
    return SimpleNamespace(penultimate_hidden_states=random(1, 17, 1280))


def _start_image(random: Random, shape: Shape) -> dict[str, Any]:
    return {"concat_latent_image": random(*shape), "concat_mask": torch.ones(1, 4, *shape[2:])}


def _start_image_and_clip(random: Random, shape: Shape) -> dict[str, Any]:
    return {**_start_image(random, shape), "clip_vision_output": _clip(random)}


def _first_and_last(random: Random, shape: Shape) -> dict[str, Any]:
    """Both images' embeddings, one after the other."""
    both = SimpleNamespace(penultimate_hidden_states=random(1, 34, 1280))
    return {**_start_image(random, shape), "clip_vision_output": both}


def _subjects(random: Random, shape: Shape) -> dict[str, Any]:
    """Phantom's images, as frames after the clip's own."""
    return {"time_dim_concat": random(*shape[:2], 2, *shape[3:])}


def _source_video(random: Random, shape: Shape) -> dict[str, Any]:
    """Bernini's videos and images, each of its own size."""
    batch, channels, _, height, width = shape
    return {"context_latents": [random(*shape), random(batch, channels, 1, height - 4, width - 6)]}


def _control(random: Random, shape: Shape) -> dict[str, Any]:
    """The control video and a start image as channels, without a mask."""
    return {"concat_latent_image": random(1, 32, *shape[2:]), "clip_vision_output": _clip(random)}


def _control_2_2(random: Random, shape: Shape) -> dict[str, Any]:
    return {
        "concat_latent_image": random(1, 32, *shape[2:]),
        "concat_mask": torch.ones(1, 4, *shape[2:]),
        "concat_mask_index": 16,
        "reference_latents": [random(1, 16, 1, *shape[3:])],
    }


def _camera(random: Random, shape: Shape) -> dict[str, Any]:
    *_, frames, height, width = shape
    path = random(1, 24, frames, 8 * height, 8 * width)
    return {**_start_image_and_clip(random, shape), "camera_conditions": path}


def _vace(random: Random, shape: Shape) -> dict[str, Any]:
    """Two control videos, as two nodes in a row have them."""
    batch, _, *space = shape
    return {
        "vace_frames": [random(batch, 32, *space) for _ in range(2)],
        "vace_mask": [torch.ones(batch, 64, *space)] * 2,
        "vace_strength": [0.7, 1.2],
    }


def _sound(random: Random, shape: Shape) -> dict[str, Any]:
    *_, frames, height, width = shape
    return {
        "audio_embed": random(1, 25, 64, 4 * frames),
        "reference_latents": [random(1, 16, 1, height, width)],
        "reference_motion": random(1, 16, 19, height, width),
        "control_video": random(*shape),
    }


def _humo(random: Random, shape: Shape) -> dict[str, Any]:
    *_, frames, height, width = shape
    return {
        "audio_embed": random(1, frames, 8, 5, 1280),
        "reference_latents": [random(1, 16, 1, height, width)],
    }


def _animate(random: Random, shape: Shape) -> dict[str, Any]:
    """The first latent frame is the reference image's. No face, whose images are large: see `test_wan.py`."""
    *_, frames, height, width = shape
    pose = random(1, 16, frames - 1, height, width)
    return {**_start_image_and_clip(random, shape), "pose_video_latent": pose}


def _scail(random: Random, shape: Shape) -> dict[str, Any]:
    """The video of the pose has half the size."""
    *_, frames, height, width = shape
    return {
        "clip_vision_output": _clip(random),
        "reference_latents": [random(1, 16, 1, height, width)],
        "pose_video_latent": random(1, 16, frames, height // 2, width // 2),
    }


def _scail_2(random: Random, shape: Shape) -> dict[str, Any]:
    *_, frames, height, width = shape
    return {
        **_scail(random, shape),
        "ref_mask_flag": True,
        "driving_mask_28ch": random(1, frames, 28, height // 2, width // 2),
        "ref_mask_28ch": random(1, frames + 1, 28, height, width),
    }


def _dancer(random: Random, shape: Shape) -> dict[str, Any]:
    music = random(1, 4 * shape[2] - 3, 35)
    return {**_start_image_and_clip(random, shape), "clip_vision_output_ref": _clip(random), "audio_embed": music}


def _case(supported_model: str, options: Options = _text, channels: int = 16, **config: Any) -> ModelCase:
    def conditioning(generator: torch.Generator, shape: Shape) -> list[Any]:
        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, generator=generator)

        return [random(1, 20, 4096), options(random, shape)]

    return ModelCase(
        supported_model=supported_model,
        config={**CONFIG, **config},
        latent_shape=(1, channels, 3, 16, 24),
        conditioning=conditioning,
    )


CASES = {
    "t2v": _case("WAN21_T2V", model_type="t2v", in_dim=16),
    "phantom": _case("WAN21_T2V", _subjects, model_type="t2v", in_dim=16),
    "bernini": _case("WAN21_T2V", _source_video, model_type="t2v", in_dim=16),
    "i2v": _case("WAN21_I2V", _start_image, model_type="i2v", in_dim=36),
    "flf2v": _case("WAN21_I2V", _first_and_last, model_type="i2v", in_dim=36, flf_pos_embed_token_number=514),
    "ti2v": _case("WAN22_T2V", channels=48, model_type="t2v", in_dim=48, out_dim=48),
    "fun-control": _case("WAN21_FunControl2V", _control, model_type="i2v", in_dim=48),
    "fun-control-2.2": _case("WAN21_T2V", _control_2_2, model_type="t2v", in_dim=52, in_dim_ref_conv=16),
    "camera": _case("WAN21_Camera", _camera, model_type="camera", in_dim=32, in_dim_control_adapter=24),
    "vace": _case("WAN21_Vace", _vace, model_type="vace", in_dim=16, num_layers=4, vace_layers=2, vace_in_dim=96),
    "s2v": _case("WAN22_S2V", _sound, model_type="s2v", in_dim=16, audio_dim=64),
    "humo": _case("WAN21_HuMo", _humo, model_type="humo", in_dim=36),
    "animate": _case("WAN22_Animate", _animate, model_type="animate", in_dim=36, num_layers=5),
    "scail": _case("WAN21_SCAIL", _scail, model_type="scail", in_dim=20),
    "scail-2": _case("WAN21_SCAIL2", _scail_2, model_type="scail2", in_dim=20),
    "dancer": _case("WAN22_WanDancer", _dancer, model_type="wandancer", in_dim=36),
}
