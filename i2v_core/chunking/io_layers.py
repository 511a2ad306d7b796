"""Layers before and after an I2VGen-XL UNet's blocks: embeddings, the first convolution, the output.

Legend: B batch, F frames, N batch × frames, C channels, H height, W width (latent), T context tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import temporal_layers, workspace
from .execution import Execution

LATENT_TOKENS = 64
"""Context tokens made of the first frame's latent, which is pooled to 32 × 32 and convolved to 16 × 16, then 8 × 8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInputs:
    """Tensors that every block takes beside the hidden state."""

    embedding: torch.Tensor
    """Embedded time step and frame rate (N, width)."""

    context: torch.Tensor
    """Context tokens for cross-attention (B, T, width)."""

    attention_kwargs: dict[str, Any]


def block_inputs(
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
) -> BlockInputs:
    """Compute the inputs that all blocks share from the arguments of the forward."""
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
        return BlockInputs(
            embedding=embedding.repeat_interleave(execution.num_frames, dim=0),
            context=_context(unet, first_latent_BCHW, image_embeddings, text_BTC),
            attention_kwargs=attention_kwargs,
        )


def _embedding(
    unet: Any, steps_B: torch.Tensor, timestep_cond: torch.Tensor | None, fps_B: torch.Tensor
) -> torch.Tensor:
    """Return the embedding of time step and frame rate (B, width)."""
    dtype = unet.time_embedding.linear_1.weight.dtype
    of_step: torch.Tensor = unet.time_embedding(unet.time_proj(steps_B).to(dtype), timestep_cond)
    return of_step + unet.fps_embedding(unet.time_proj(fps_B).to(dtype))


def _context(
    unet: Any, first_latent_BCHW: torch.Tensor, image_embeddings: torch.Tensor, text_BTC: torch.Tensor
) -> torch.Tensor:
    """Return the context tokens (B, T, width): text, then the first frame's latent, then the picture."""
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
    """Return the first hidden state (N, C, H, W), of sample and image features concatenated a chunk at a time."""
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
    """Return the features of the image latents (N, C, H, W), of the same shape, which `conv_in` takes."""
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
    """Return the prediction (B, F, C, H, W) for the last hidden state (N, C, H, W)."""
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
