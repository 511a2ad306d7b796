"""The denoiser's two ends: what goes into its blocks, and what comes out of them.

Legend: B batch, F frames, N batch × frames, C channels, H height, W width (latent), T context tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import temporal_layers, workspace
from .execution import Execution

LATENT_TOKENS = 64
"""What the first frame's latent is pooled and convolved to, whatever its size: 32 × 32, then 16 × 16, then 8 × 8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConditions:
    """What every block looks at: the embedding of time and frame rate (N, width), the context (B, T, width)."""

    embedding: torch.Tensor
    context: torch.Tensor
    attention_kwargs: dict[str, Any]


def conditions(
    unet: Any,
    execution: Execution,
    *,
    timestep: torch.Tensor | float,
    timestep_cond: torch.Tensor | None,
    fps: torch.Tensor,
    first_latent_BCHW: torch.Tensor,
    image_embeddings: torch.Tensor,
    text_BTC: torch.Tensor,
    attention_kwargs: dict[str, Any],
) -> StepConditions:
    """All that the blocks look at, from what the caller gave."""
    modules = (unet.time_embedding, unet.fps_embedding, unet.image_latents_context_embedding, unet.context_embedding)
    batch, channels, height, width = first_latent_BCHW.shape
    unit_bytes = workspace.embeddings(
        batch=batch,
        frames=batch * execution.num_frames,
        width=unet.time_embedding.linear_2.out_features,
        conv_width=unet.image_latents_context_embedding[0].out_channels,
        pixels=height * width,
        text_tokens=text_BTC.shape[1],
        image_tokens=LATENT_TOKENS + channels,
        context_width=text_BTC.shape[2],
        itemsize=first_latent_BCHW.element_size(),
    )
    with execution.layer("embeddings", *modules, total=1, unit_bytes=unit_bytes):
        steps = torch.as_tensor(timestep, device=fps.device).reshape(-1).expand(batch)
        embedding = _embedding(unet, steps, timestep_cond, fps)
        return StepConditions(
            embedding=embedding.repeat_interleave(execution.num_frames, dim=0),
            context=_context(unet, first_latent_BCHW, image_embeddings, text_BTC),
            attention_kwargs=attention_kwargs,
        )


def _embedding(
    unet: Any, steps_B: torch.Tensor, timestep_cond: torch.Tensor | None, fps_B: torch.Tensor
) -> torch.Tensor:
    """The step and the frame rate (B, width)."""
    dtype = unet.time_embedding.linear_1.weight.dtype
    of_step: torch.Tensor = unet.time_embedding(unet.time_proj(steps_B).to(dtype), timestep_cond)
    return of_step + unet.fps_embedding(unet.time_proj(fps_B).to(dtype))


def _context(
    unet: Any, first_latent_BCHW: torch.Tensor, image_embeddings: torch.Tensor, text_BTC: torch.Tensor
) -> torch.Tensor:
    """Text, then the first frame's latent, then the picture, as tokens."""
    latent_tokens: torch.Tensor = unet.image_latents_context_embedding(first_latent_BCHW)
    picture_tokens: torch.Tensor = unet.context_embedding(image_embeddings)
    return torch.cat(
        [
            text_BTC,
            latent_tokens.flatten(2).transpose(1, 2),
            picture_tokens.view(-1, unet.config.in_channels, unet.config.cross_attention_dim),
        ],
        dim=1,
    )


def conv_in(
    unet: Any, execution: Execution, sample_BCFHW: torch.Tensor, image_latents_BCFHW: torch.Tensor
) -> torch.Tensor:
    """The first hidden state (N, C, H, W): noisy sample and image features, joined a chunk of frames at a time."""
    sample = _by_frame(sample_BCFHW)
    features = _image_features(unet, execution, _by_frame(image_latents_BCFHW))
    unit_bytes = workspace.conv_in(
        channels=unet.conv_in.in_channels,
        out=unet.conv_in.out_channels,
        pixels=sample.shape[-2] * sample.shape[-1],
        itemsize=sample.element_size(),
    )
    with execution.layer("conv_in", unet.conv_in, unit="frame", total=len(sample), unit_bytes=unit_bytes) as call:
        return execution.over_frames(
            call,
            lambda frames: unet.conv_in(torch.cat([sample[frames], features[frames]], dim=1)),
            sample,
            (unet.conv_in.out_channels, *sample.shape[2:]),
        )


def _image_features(unet: Any, execution: Execution, latents: torch.Tensor) -> torch.Tensor:
    """What conv_in sees of the image latents (N, C, H, W), of the same shape."""
    unit_bytes = workspace.image_latents(
        channels=latents.shape[1], pixels=latents.shape[-2] * latents.shape[-1], itemsize=latents.element_size()
    )
    project = unet.image_latents_proj_in
    with execution.layer("image_latents", project, unit="frame", total=len(latents), unit_bytes=unit_bytes) as call:
        features = execution.over_frames(
            call, lambda frames: project(latents[frames]), latents, tuple(latents.shape[1:])
        )
    return temporal_layers.image_temporal(execution, unet.image_latents_temporal_encoder, features)


def out(unet: Any, execution: Execution, hidden: torch.Tensor) -> torch.Tensor:
    """The prediction (B, F, C, H, W)."""
    unit_bytes = workspace.out(
        width=hidden.shape[1],
        out=unet.conv_out.out_channels,
        pixels=hidden.shape[-2] * hidden.shape[-1],
        itemsize=hidden.element_size(),
    )
    modules = (unet.conv_norm_out, unet.conv_act, unet.conv_out)
    with execution.layer("out", *modules, unit="frame", total=len(hidden), unit_bytes=unit_bytes) as call:
        prediction = execution.over_frames(
            call,
            lambda frames: unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden[frames]))),
            hidden,
            (unet.conv_out.out_channels, *hidden.shape[2:]),
        )
    return prediction.view(-1, execution.num_frames, *prediction.shape[1:])


def _by_frame(video_BCFHW: torch.Tensor) -> torch.Tensor:
    return video_BCFHW.transpose(1, 2).flatten(0, 1)
