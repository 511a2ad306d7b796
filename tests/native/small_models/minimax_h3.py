"""Small MiniMax H3 models, with the conditioning that core's nodes make."""

from __future__ import annotations

from typing import Any

import torch
from comfy_host.model_case import ModelCase

CONFIG = {
    "image_model": "minimax_h3",
    "hidden_size": 64,
    "num_layers": 3,
    "token_refiner_num_layers": 1,
    "num_attention_heads": 8,
    "attention_head_dim": 32,
    "ffn_hidden_size": 96,
    "latents_dim": 24,
    "audio_latents_dim": 32,
    "text_dim": 80,
    "timestep_input_dim": 32,
    "time_embed_hidden_size": 48,
    "time_embed_dim": 40,
    "rope_inv_freq_len": 4,
}
CURVES = {
    **{name: value for name, value in CONFIG.items() if not name.startswith("time")},
    "adaln_curve_grid": 16,
    "time_embed_dim": 8,
}
"""The form of the files that users have: the time embedding as a table."""
FRAMES, LATENT_FRAMES, AUDIO_LATENTS = 22, 7, 37


def _conditioning(options: Any) -> Any:
    def make(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
        # Vision tokens among the words; lengths differ, since core compares prompts of one length value by value.
        length = int(torch.randint(20, 40, (), generator=generator))
        tags = torch.ones(1, length, dtype=torch.long)
        tags[:, 3:9] = 0
        text = torch.randn(1, length, 80, generator=generator)
        return [text, {"minimax_token_tags": tags, **options(generator, shape)}]

    return make


def _text(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, Any]:
    return {}


def _keyframes(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, Any]:
    keyframes = [
        {"resolved_frame_index": index, "latent": torch.randn(1, 24, 1, *shape[3:], generator=generator)}
        for index in (0, FRAMES - 1)
    ]
    return {"minimax_keyframes": keyframes, "minimax_frame_count": FRAMES}


def _references(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, Any]:
    def latent(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    size = {"latent_h": 6, "latent_w": 4}
    sound = {"ref_audio_t": 8, "audio_latent": latent(32, 2, 8)}
    video = {"latent_t": 2, **size, "latent": latent(24, 2, 6, 4)}
    references = [
        {"kind": "image", **size, "latent": latent(24, 1, 6, 4)},
        {"kind": "video", **video, "ref_audio_t": 0, "audio_latent": None},
        {"kind": "video_audio", **video, **sound},
        {"kind": "audio", **sound},
    ]
    return {"minimax_refs": references}


def _case(options: Any, config: dict[str, Any] = CONFIG) -> ModelCase:
    return ModelCase(
        supported_model="MiniMaxH3",
        config=config,
        latent_shape=(1, 24, LATENT_FRAMES, 8, 12),
        audio_latent_shape=(1, 32, 2, AUDIO_LATENTS),
        conditioning=_conditioning(options),
    )


CASES = {
    "t2v": _case(_text),
    "keyframes": _case(_keyframes, CURVES),
    "references": _case(_references, CURVES),
}
