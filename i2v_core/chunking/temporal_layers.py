"""Layers that process each pixel over all frames, run over chunks of pixels.

Their group normalisations take statistics over all pixels, and so run in two passes (`group_norm`).

Legend: B batch, F frames, C channels, P pixels (height × width, or a chunk of them).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from . import workspace
from .execution import Execution
from .group_norm import ChannelAffine, norm_over_frames, statistics_pass
from .transformer_block import apply_block

LARGEST_ATTENTION_BATCH = 65_535
"""Largest batch of CUDA's attention kernels, which put it on a grid axis of this size and fail beyond it."""


def temporal_conv(execution: Execution, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Run a `TemporalConvLayer`, in place if chunked.

    The stages go from `hidden` to one scratch tensor of its size, stay in that, and are added back to `hidden`.
    """
    hidden = hidden.contiguous()
    pixels_BFCP = by_pixel(execution, hidden)
    frames, channels = len(hidden), hidden.shape[1]
    sizes = {"channels": channels, "frames": frames, "itemsize": hidden.element_size()}
    total = pixels_BFCP.shape[-1]
    with execution.layer(
        "temporal_conv",
        layer,
        unit="pixel",
        total=total,
        unit_bytes=workspace.temporal_conv(**sizes),
        unchunked_bytes=workspace.plain_temporal_conv(**sizes) * total,
        preparation=statistics_pass(pixels_BFCP),
        smallest=hidden.shape[-1],
        result_excluded=True,  # the scratch tensor is not part of the workspace
    ) as call:
        if execution.runner.shape_only:
            scratch = torch.empty_like(hidden)  # lives until the context ends, as it does in a real run
            return scratch if call.unchunked else hidden
        if call.unchunked:
            return layer(hidden, num_frames=execution.num_frames)
        source_BFCP, scratch_BFCP = pixels_BFCP, torch.empty_like(pixels_BFCP)
        for stage in (layer.conv1, layer.conv2, layer.conv3):
            affine = norm_over_frames(execution, stage[0], source_BFCP)
            for chunk in execution.chunks(call):
                scratch_BFCP[..., chunk] = _convolve(stage, affine, source_BFCP[..., chunk])
            source_BFCP = scratch_BFCP
        affine = norm_over_frames(execution, layer.conv4[0], scratch_BFCP)
        for chunk in execution.chunks(call):
            pixels_BFCP[..., chunk].add_(_convolve(layer.conv4, affine, scratch_BFCP[..., chunk]))
    return hidden


def _convolve(stage: Any, affine: ChannelAffine, chunk_BFCP: torch.Tensor) -> torch.Tensor:
    """Run one stage (group norm, SiLU, temporal convolution; dropout is idle) on a chunk of pixels."""
    return convolve_normalised(stage[-1], affine, chunk_BFCP)


def convolve_normalised(conv: Any, affine: ChannelAffine, chunk_BFCP: torch.Tensor) -> torch.Tensor:
    """Run group norm, SiLU and a temporal convolution on a chunk of pixels; returns (B, F, C, P)."""
    batch, frames, channels, pixels = chunk_BFCP.shape
    normed_BCFP = chunk_BFCP.new_empty(batch, channels, frames, pixels)
    affine.apply(chunk_BFCP, out=normed_BCFP.transpose(1, 2))
    functional.silu(normed_BCFP, inplace=True)
    convolved_BCFP1: torch.Tensor = conv(normed_BCFP.unsqueeze(-1))
    return convolved_BCFP1.squeeze(-1).transpose(1, 2)


def temporal_transformer(
    execution: Execution, model: Any, hidden: torch.Tensor, attention_kwargs: dict[str, Any]
) -> torch.Tensor:
    """Run a `TransformerTemporalModel`, in place if chunked."""
    hidden = hidden.contiguous()
    pixels_BFCP = by_pixel(execution, hidden)
    batch, _, channels, total = pixels_BFCP.shape
    sizes = {
        "width": model.proj_in.out_features,
        "channels": channels,
        "frames": len(hidden),
        "itemsize": hidden.element_size(),
    }
    with execution.layer(
        "temporal_transformer",
        model,
        unit="pixel",
        total=total,
        unit_bytes=workspace.temporal_transformer(**sizes),
        unchunked_bytes=workspace.plain_temporal_transformer(**sizes) * total,
        preparation=statistics_pass(pixels_BFCP),
        smallest=hidden.shape[-1],
        largest=LARGEST_ATTENTION_BATCH // batch,
    ) as call:
        if execution.runner.shape_only:
            return torch.empty_like(hidden) if call.unchunked else hidden
        if call.unchunked:
            return model(
                hidden,
                num_frames=execution.num_frames,
                cross_attention_kwargs=attention_kwargs,
                return_dict=False,
            )[0]
        affine = norm_over_frames(execution, model.norm, pixels_BFCP)
        for chunk in execution.chunks(call):
            chunk_BFCP = pixels_BFCP[..., chunk]
            chunk_BFCP.add_(_transform(model, affine, chunk_BFCP, attention_kwargs))
    return hidden


def _transform(
    model: Any, affine: ChannelAffine, chunk_BFCP: torch.Tensor, attention_kwargs: dict[str, Any]
) -> torch.Tensor:
    """Return the residual (B, F, C, P) that a temporal transformer adds to a chunk of pixels."""
    batch, frames, channels, pixels = chunk_BFCP.shape
    normed_BPFC = chunk_BFCP.new_empty(batch, pixels, frames, channels)
    affine.apply(chunk_BFCP, out=normed_BPFC.permute(0, 2, 3, 1))
    tokens: torch.Tensor = model.proj_in(normed_BPFC.flatten(0, 1))
    del normed_BPFC
    for block in model.transformer_blocks:
        apply_block(block, tokens, None, attention_kwargs)
    added: torch.Tensor = model.proj_out(tokens)
    return added.view(batch, pixels, frames, channels).permute(0, 2, 3, 1)


def image_temporal(execution: Execution, encoder: Any, features: torch.Tensor) -> torch.Tensor:
    """Run the temporal encoder of the image latents' features (B × F, C, H, W), in place."""
    pixels_BFCP = by_pixel(execution, features)
    batch, frames, channels, total = pixels_BFCP.shape
    unit_bytes = workspace.image_temporal(channels=channels, frames=len(features), itemsize=features.element_size())
    with execution.layer(
        "image_temporal",
        encoder,
        unit="pixel",
        total=total,
        unit_bytes=unit_bytes,
        smallest=features.shape[-1],
        largest=LARGEST_ATTENTION_BATCH // batch,
    ) as call:
        if execution.runner.shape_only:
            return features
        for chunk in execution.chunks(call):
            chunk_BFCP = pixels_BFCP[..., chunk]
            tokens = chunk_BFCP.permute(0, 3, 1, 2).reshape(-1, frames, channels)
            encoded: torch.Tensor = encoder(tokens)
            chunk_BFCP.copy_(encoded.view(batch, -1, frames, channels).permute(0, 2, 3, 1))
            del tokens, encoded
    return features


def by_pixel(execution: Execution, hidden: torch.Tensor) -> torch.Tensor:
    """Return a view (B, F, C, P) of contiguous frames (B × F, C, H, W)."""
    return hidden.view(-1, execution.num_frames, hidden.shape[1], hidden.shape[2] * hidden.shape[3])
