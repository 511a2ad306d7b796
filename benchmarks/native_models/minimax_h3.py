"""MiniMax H3 at its real size, in the form of core's own files: the time embedding as a table."""

from __future__ import annotations

from typing import Any

import torch
from comfy_host.model_case import ModelCase

CONFIG = {
    "image_model": "minimax_h3",
    "hidden_size": 5376,
    "num_layers": 50,
    "token_refiner_num_layers": 2,
    "num_attention_heads": 56,
    "attention_head_dim": 128,
    "ffn_hidden_size": 14336,
    "latents_dim": 24,
    "audio_latents_dim": 32,
    "text_dim": 5120,
    "time_embed_dim": 8,
    "adaln_curve_grid": 1024,
    "rope_inv_freq_len": 16,
}
_FRAMES_PER_SECOND, _AUDIO_LATENTS_PER_SECOND = 24, 40
_TEXT_TOKENS = 512


def _text(generator: torch.Generator, _shape: tuple[int, ...]) -> list[Any]:
    text = torch.randn(1, _TEXT_TOKENS, 5120, generator=generator)
    return [text, {"minimax_token_tags": torch.ones(1, _TEXT_TOKENS, dtype=torch.long)}]


def _keyframes(frames: int) -> Any:
    """First and last frame."""

    def make(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
        text, options = _text(generator, shape)
        latent = torch.zeros(1, 24, 1, *shape[3:])
        keyframes = [{"resolved_frame_index": index, "latent": latent} for index in (0, frames - 1)]
        return [text, {**options, "minimax_keyframes": keyframes, "minimax_frame_count": frames}]

    return make


def _references(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    """Two pictures of the clip's size, and five seconds of sound, as in core's template."""
    text, options = _text(generator, shape)
    height, width = shape[3:]
    picture = {"kind": "image", "latent_h": height, "latent_w": width, "latent": torch.zeros(1, 24, 1, height, width)}
    sound = {"kind": "audio", "ref_audio_t": 200, "audio_latent": torch.zeros(1, 32, 2, 200)}
    return [text, {**options, "minimax_refs": [picture, picture, sound]}]


def _case(width: int, height: int, frames: int, conditioning: Any) -> ModelCase:
    return ModelCase(
        supported_model="MiniMaxH3",
        config=CONFIG,
        latent_shape=(1, 24, (frames - 5) // 17 * 5 + 2, height // 16, width // 16),
        audio_latent_shape=(1, 32, 2, round(frames / _FRAMES_PER_SECOND * _AUDIO_LATENTS_PER_SECOND)),
        conditioning=conditioning,
    )


CASES = [
    ("MiniMax H3", "864×480×124", _case(864, 480, 124, _text)),  # core's template
    ("MiniMax H3 keyframes", "864×480×124", _case(864, 480, 124, _keyframes(124))),
    ("MiniMax H3 references", "864×480×124", _case(864, 480, 124, _references)),
    ("MiniMax H3", "1344×768×124", _case(1344, 768, 124, _text)),
    ("MiniMax H3", "1344×768×243", _case(1344, 768, 243, _text)),
]
