"""Layers that are made of a part over space and a part over time: those of Stable Video Diffusion's denoiser.

Blattmann et al., "Stable Video Diffusion: Scaling Latent Video Diffusion Models to Large Datasets", 2023. The part over
space runs over chunks of frames, that over time over strips of pixels that hold all frames.

Legend: B batch, F frames, N batch × frames, C channels, H height, W width (latent), P pixels (height × width, or a
strip of them), D width of a token, T context tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from . import workspace
from .execution import Execution
from .group_norm import over_all_frames, statistics
from .temporal_layers import LARGEST_ATTENTION_BATCH, by_pixel, convolve_normalised
from .transformer_block import apply_block, apply_temporal_block


def temporal_resnet(execution: Execution, block: Any, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """The `TemporalResnetBlock` of a `SpatioTemporalResBlock` and the blend of both, in place.

    `embedding` (N, width) is the same for all frames of a clip.
    """
    hidden = hidden.contiguous()
    pixels_BFCP = by_pixel(execution, hidden)
    layer = block.temporal_res_block
    scratch_BFCP = torch.empty_like(pixels_BFCP)
    with execution.layer(
        "temporal_resnet",
        layer,
        block.time_mixer,
        unit="pixel",
        total=pixels_BFCP.shape[-1],
        unit_bytes=workspace.temporal_conv(
            channels=hidden.shape[1], frames=len(hidden), itemsize=hidden.element_size()
        ),
        beforehand=statistics(pixels_BFCP),
        smallest=hidden.shape[-1],
    ) as call:
        if execution.runner.shape_only:
            return hidden
        of_clip = embedding[:: execution.num_frames]
        told_B1C1 = layer.time_emb_proj(layer.nonlinearity(of_clip))[:, None, :, None]
        affine = over_all_frames(execution, layer.norm1, pixels_BFCP)
        for strip in execution.chunks(call):
            scratch_BFCP[..., strip] = convolve_normalised(layer.conv1, affine, pixels_BFCP[..., strip]).add_(told_B1C1)
        affine = over_all_frames(execution, layer.norm2, scratch_BFCP)
        share = temporal_share(block.time_mixer, hidden.dtype)
        for strip in execution.chunks(call):
            pixels_BFCP[..., strip].addcmul_(convolve_normalised(layer.conv2, affine, scratch_BFCP[..., strip]), share)
    return hidden


def temporal_share(mixer: Any, dtype: torch.dtype) -> torch.Tensor:
    """What an `AlphaBlender` takes of the part over time, where all frames are a video's: a number."""
    video = torch.zeros(1, 1, device=mixer.mix_factor.device)
    spatial: torch.Tensor = mixer.get_alpha(video, 3).to(dtype).reshape(())
    return spatial if mixer.switch_spatial_to_temporal_mix else 1.0 - spatial


def transformer(execution: Execution, model: Any, hidden: torch.Tensor, context_BTD: torch.Tensor) -> torch.Tensor:
    """A `TransformerSpatioTemporalModel`, in place; its tokens take as much again."""
    hidden = hidden.contiguous()
    tokens_NPD = hidden.new_empty(len(hidden), hidden.shape[-2] * hidden.shape[-1], model.inner_dim)
    blocks = list(zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True))
    for index, (block, temporal_block) in enumerate(blocks):
        _over_space(execution, model, block, hidden if index == 0 else None, tokens_NPD, context_BTD)
        is_last = index == len(blocks) - 1
        _over_time(execution, model, temporal_block, tokens_NPD, hidden, context_BTD, is_last=is_last)
    return hidden


def _over_space(
    execution: Execution,
    model: Any,
    block: Any,
    hidden: torch.Tensor | None,
    tokens_NPD: torch.Tensor,
    context_BTD: torch.Tensor,
) -> None:
    """A block over the pixels of each frame, in place on the tokens; which come of `hidden`, where that is given."""
    frames, pixels, width = tokens_NPD.shape
    unit_bytes = workspace.transformer_in_place(
        width=width,
        channels=0 if hidden is None else hidden.shape[1],
        pixels=pixels,
        context_tokens=context_BTD.shape[1],
        context_width=context_BTD.shape[2],
        itemsize=tokens_NPD.element_size(),
    )
    ends = () if hidden is None else (model.norm, model.proj_in)
    with execution.layer("transformer", *ends, block, unit="frame", total=frames, unit_bytes=unit_bytes) as call:
        if execution.runner.shape_only:
            return
        batch_of_frame = torch.arange(frames, device=tokens_NPD.device) // execution.num_frames
        for piece in execution.chunks(call):
            if hidden is not None:
                normed_nPC = model.norm(hidden[piece]).flatten(2).transpose(1, 2)
                tokens_NPD[piece] = model.proj_in(normed_nPC)
                del normed_nPC
            apply_block(block, tokens_NPD[piece], context_BTD[batch_of_frame[piece]], {})


def _over_time(
    execution: Execution,
    model: Any,
    block: Any,
    tokens_NPD: torch.Tensor,
    hidden: torch.Tensor,
    context_BTD: torch.Tensor,
    *,
    is_last: bool,
) -> None:
    """A block over the frames of each pixel, blended into the tokens; after the last, `hidden` takes what is added."""
    batch, context_tokens, context_width = context_BTD.shape
    _, pixels, width = tokens_NPD.shape
    tokens_BFPD = tokens_NPD.view(batch, -1, pixels, width)
    unit_bytes = workspace.temporal_block(
        width=width,
        frames=len(tokens_NPD),
        batch=batch,
        context_tokens=context_tokens,
        context_width=context_width,
        itemsize=tokens_NPD.element_size(),
    )
    ends = (model.time_pos_embed, model.time_mixer, *((model.proj_out,) if is_last else ()))
    with execution.layer(
        "temporal_transformer",
        block,
        *ends,
        unit="pixel",
        total=pixels,
        unit_bytes=unit_bytes,
        smallest=hidden.shape[-1],
        largest=LARGEST_ATTENTION_BATCH // batch,
    ) as call:
        if execution.runner.shape_only:
            return
        places_FD = _places(model, tokens_BFPD)
        spatial_share = 1.0 - temporal_share(model.time_mixer, tokens_NPD.dtype)
        for strip in execution.chunks(call):
            spatial_BPFD = tokens_BFPD[:, :, strip].transpose(1, 2)
            temporal_BPFD = torch.add(spatial_BPFD.contiguous(), places_FD)
            apply_temporal_block(block, temporal_BPFD.flatten(0, 1), context_BTD)
            temporal_BPFD.lerp_(spatial_BPFD, spatial_share)
            if is_last:
                added_BPFC = model.proj_out(temporal_BPFD)
                by_pixel(execution, hidden)[..., strip].add_(added_BPFC.permute(0, 2, 3, 1))
                del added_BPFC
            else:
                spatial_BPFD.copy_(temporal_BPFD)
            del temporal_BPFD  # not beside the next strip's


def _places(model: Any, tokens_BFPD: torch.Tensor) -> torch.Tensor:
    """The embedding of each frame's place in the clip (F, D)."""
    numbers = torch.arange(tokens_BFPD.shape[1], device=tokens_BFPD.device)
    return model.time_pos_embed(model.time_proj(numbers).to(tokens_BFPD.dtype))
