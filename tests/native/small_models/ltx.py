"""Small LTX-Video and LTX-2.x models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy_host.model_case import ModelCase

LTXV = {
    "image_model": "ltxv",
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
    "caption_channels": 48,
    "causal_temporal_positioning": True,
}
LTX2 = {
    **LTXV,
    "image_model": "ltxav",
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 32,
    "use_middle_indices_grid": True,
    "rope_type": "split",
    "frequencies_precision": "float64",
    "av_ca_timestep_scale_multiplier": 1000.0,
    "connector_num_attention_heads": 3,
    "connector_attention_head_dim": 16,
}
LTX23 = {
    **LTX2,
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "connector_apply_gated_attention": True,
    "connector_num_attention_heads": 4,
    "audio_connector_attention_head_dim": 8,
}
VIDEO = (1, 128, 4, 7, 12)
AUDIO = (1, 8, 140, 16)
TEXT_MASK = torch.tensor([[1] * 15 + [0] * 5])
TOKENS_PER_FRAME = VIDEO[3] * VIDEO[4]

Conditioning = Callable[[torch.Generator, tuple[int, ...]], list[Any]]


def _text(width: int, make_options: Callable[..., dict[str, Any]] | None = None, **options: Any) -> Conditioning:
    def make(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
        made = {} if make_options is None else make_options(shape)
        return [torch.randn(1, 20, width, generator=generator), {**options, **made}]

    return make


def _start_image(shape: tuple[int, ...]) -> dict[str, Any]:
    """Keeps the first latent frame, in part."""
    mask = torch.ones(shape)
    mask[:, :, 0] = 0.3
    return {"concat_mask": mask}


def _inpainting(shape: tuple[int, ...]) -> dict[str, Any]:
    """Keeps a corner of each frame."""
    mask = torch.ones(shape)
    mask[:, :, :, :3, :5] = 0
    return {"concat_mask": mask}


def _guides(shape: tuple[int, ...]) -> dict[str, Any]:
    """Two guides of one latent frame each at the clip's end: one weakened in parts, one with every other token."""
    mask = torch.ones(shape)
    mask[:, :, -2] = 0.2
    mask[:, :, -1] = -1
    mask[:, :, -1, ::2, ::2] = 0.4
    positions = torch.zeros(1, 3, 2 * TOKENS_PER_FRAME, 2)
    positions[:, 0, :TOKENS_PER_FRAME], positions[:, 0, TOKENS_PER_FRAME:] = 8, 16
    positions[:, 1:] = torch.linspace(0, 250, 2 * TOKENS_PER_FRAME).view(1, 1, -1, 1)
    pixels = torch.linspace(0, 1, 7 * 12).view(1, 1, 1, 7, 12)
    latent = {"pre_filter_count": TOKENS_PER_FRAME, "latent_shape": [1, 7, 12]}
    entries = [{**latent, "strength": 0.8, "pixel_mask": pixels}, {**latent, "strength": 0.5, "pixel_mask": None}]
    return {"concat_mask": mask, "keyframe_idxs": positions, "guide_attention_entries": entries}


def _with_audio(make_options: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The same options, with the mask packed together with one that keeps some of the audio."""

    def make(shape: tuple[int, ...]) -> dict[str, Any]:
        options, audio = make_options(shape), torch.ones(AUDIO)
        audio[:, :, :40] = 0.5
        packed = torch.cat([it.reshape(1, 1, -1) for it in (options["concat_mask"], audio)], dim=2)
        return {**options, "concat_mask": packed}

    return make


def _ltxv(conditioning: Conditioning) -> ModelCase:
    return ModelCase(supported_model="LTXV", config=LTXV, latent_shape=VIDEO, conditioning=conditioning)


def _ltx2(
    conditioning: Conditioning, config: dict[str, Any] = LTX2, audio: tuple[int, ...] | None = AUDIO
) -> ModelCase:
    return ModelCase(
        supported_model="LTXAV",
        config=config,
        latent_shape=VIDEO,
        audio_latent_shape=audio,
        conditioning=conditioning,
    )


CASES = {
    "t2v": _ltxv(_text(48, attention_mask=TEXT_MASK)),
    "i2v": _ltxv(_text(48, _start_image, attention_mask=TEXT_MASK)),
    "guides": _ltxv(_text(48, _guides, attention_mask=TEXT_MASK)),
    "av": _ltx2(_text(96)),
    "av-i2v": _ltx2(_text(48, _with_audio(_start_image), unprocessed_ltxav_embeds=True)),
    "av-inpainting": _ltx2(_text(96, _with_audio(_inpainting))),
    "av-guides": _ltx2(_text(96, _with_audio(_guides))),
    "av-silent": _ltx2(_text(96, _inpainting), audio=None),
    "av-reference": _ltx2(_text(96, _with_audio(_start_image), ref_audio={"tokens": torch.ones(1, 30, 128)})),
    "23": _ltx2(_text(96, _with_audio(_start_image), unprocessed_ltxav_embeds=True), LTX23),
}
