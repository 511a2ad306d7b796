"""LTX-Video and LTX-2.x at their real size, from a start image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy_host.model_case import ModelCase

LTXV_13B = {
    "image_model": "ltxv",
    "num_layers": 48,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "cross_attention_dim": 4096,
    "caption_channels": 4096,
    "causal_temporal_positioning": True,
}
LTX2_19B = {
    "image_model": "ltxav",
    "num_layers": 48,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "cross_attention_dim": 4096,
    "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "caption_channels": 3840,
    "causal_temporal_positioning": True,
    "use_middle_indices_grid": True,
    "rope_type": "split",
    "frequencies_precision": "float64",
    "av_ca_timestep_scale_multiplier": 1000.0,
}
LTX23_22B = {
    **LTX2_19B,
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "connector_apply_gated_attention": True,
    "connector_num_layers": 8,
    "connector_num_attention_heads": 32,
    "connector_attention_head_dim": 128,
    "audio_connector_num_attention_heads": 32,
    "audio_connector_attention_head_dim": 64,
}
AUDIO = (1, 8, 121, 16)
"""The audio latent of 121 frames at 25 frames a second: one step for each."""


def _start_image(width: int, tokens: int = 256, **options: Any) -> Callable[..., list[Any]]:
    """Conditioning of text with a mask that keeps the first latent frame, as the sampler hands it to the model."""

    def make(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
        mask = torch.ones(shape)
        mask[:, :, 0] = 0
        return [torch.randn(1, tokens, width, generator=generator), {"concat_mask": mask, **options}]

    return make


def _with_audio(conditioning: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """The same, whose mask is packed with the audio's."""

    def make(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
        embedding, options = conditioning(generator, shape)
        _, channels, _, bins = AUDIO
        audio = torch.ones(1, 1, channels * ((shape[2] - 1) * 8 + 1) * bins)
        packed = torch.cat([options["concat_mask"].reshape(1, 1, -1), audio], 2)
        return [embedding, {**options, "concat_mask": packed}]

    return make


def _ltx2(config: dict[str, Any], conditioning: Callable[..., list[Any]], height: int, width: int) -> ModelCase:
    return ModelCase(
        supported_model="LTXAV",
        config=config,
        latent_shape=(1, 128, 16, height, width),
        audio_latent_shape=AUDIO,
        conditioning=_with_audio(conditioning),
    )


LTXV_704P = ModelCase(
    supported_model="LTXV",
    config=LTXV_13B,
    latent_shape=(1, 128, 16, 22, 38),
    conditioning=_start_image(4096, attention_mask=torch.ones(1, 256, dtype=torch.long)),
)
LTX2_TEXT = _start_image(2 * 3840, tokens=1024)
LTX23_TEXT = _start_image(4096 + 2048, unprocessed_ltxav_embeds=True)

CASES = [
    ("LTXV 13B", "1216×704×121", LTXV_704P),
    ("LTX-2 19B", "1280×704×121", _ltx2(LTX2_19B, LTX2_TEXT, 22, 40)),
    ("LTX-2 19B", "1920×1088×121", _ltx2(LTX2_19B, LTX2_TEXT, 34, 60)),
    ("LTX-2.3 22B", "1280×704×121", _ltx2(LTX23_22B, LTX23_TEXT, 22, 40)),
    ("LTX-2.3 22B", "1920×1088×121", _ltx2(LTX23_22B, LTX23_TEXT, 34, 60)),
]
