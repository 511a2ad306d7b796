"""Layers of Stable Video Diffusion's UNet, each with a spatial part and a temporal part.

Blattmann et al., "Stable Video Diffusion: Scaling Latent Video Diffusion Models to Large Datasets", 2023. The spatial
part runs over chunks of frames, the temporal part over chunks of pixels that hold all frames.

Legend: B batch, F frames, N batch × frames, C channels, H height, W width (latent), P pixels (height × width, or a
chunk of them), D width of a token, T context tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from . import workspace
from .execution import Execution
from .group_norm import norm_over_frames, statistics_pass
from .temporal_layers import LARGEST_ATTENTION_BATCH, by_pixel, convolve_normalised
from .transformer_block import apply_block, apply_temporal_block


def temporal_resnet(execution: Execution, block: Any, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Run the `TemporalResnetBlock` of a `SpatioTemporalResBlock`, and blend its result into `hidden`, in place.

    `embedding` (N, width) must be the same for all frames of a clip.
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
        preparation=statistics_pass(pixels_BFCP),
        smallest=hidden.shape[-1],
    ) as call:
        if execution.runner.shape_only:
            return hidden
        clip_embedding = embedding[:: execution.num_frames]
        embedding_B1C1 = layer.time_emb_proj(layer.nonlinearity(clip_embedding))[:, None, :, None]
        affine = norm_over_frames(execution, layer.norm1, pixels_BFCP)
        for chunk in execution.chunks(call):
            scratch_BFCP[..., chunk] = convolve_normalised(layer.conv1, affine, pixels_BFCP[..., chunk]).add_(
                embedding_B1C1
            )
        affine = norm_over_frames(execution, layer.norm2, scratch_BFCP)
        share = temporal_share(block.time_mixer, hidden.dtype)
        for chunk in execution.chunks(call):
            pixels_BFCP[..., chunk].addcmul_(convolve_normalised(layer.conv2, affine, scratch_BFCP[..., chunk]), share)
    return hidden


def temporal_share(mixer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight, a scalar tensor, that an `AlphaBlender` gives the temporal part for frames of a video."""
    video = torch.zeros(1, 1, device=mixer.mix_factor.device)
    spatial: torch.Tensor = mixer.get_alpha(video, 3).to(dtype).reshape(())
    return spatial if mixer.switch_spatial_to_temporal_mix else 1.0 - spatial


def transformer(execution: Execution, model: Any, hidden: torch.Tensor, context_BTD: torch.Tensor) -> torch.Tensor:
    """Run a `TransformerSpatioTemporalModel`, in place; its tokens take as much memory again as `hidden`."""
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
    """Run a block over the pixels of each frame, in place on the tokens, which are first made of `hidden` if given."""
    frames, pixels, width = tokens_NPD.shape
    unit_bytes = workspace.transformer_in_place(
        width=width,
        channels=0 if hidden is None else hidden.shape[1],
        pixels=pixels,
        context_tokens=context_BTD.shape[1],
        context_width=context_BTD.shape[2],
        itemsize=tokens_NPD.element_size(),
    )
    outer_modules = () if hidden is None else (model.norm, model.proj_in)
    with execution.layer(
        "transformer", *outer_modules, block, unit="frame", total=frames, unit_bytes=unit_bytes
    ) as call:
        if execution.runner.shape_only:
            return
        batch_of_frame = torch.arange(frames, device=tokens_NPD.device) // execution.num_frames
        for chunk in execution.chunks(call):
            if hidden is not None:
                normed_nPC = model.norm(hidden[chunk]).flatten(2).transpose(1, 2)
                tokens_NPD[chunk] = model.proj_in(normed_nPC)
                del normed_nPC
            apply_block(block, tokens_NPD[chunk], context_BTD[batch_of_frame[chunk]], {})


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
    """Run a block over the frames of each pixel and blend it into the tokens; the last adds their projection to
    `hidden`.
    """
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
    outer_modules = (model.time_pos_embed, model.time_mixer, *((model.proj_out,) if is_last else ()))
    with execution.layer(
        "temporal_transformer",
        block,
        *outer_modules,
        unit="pixel",
        total=pixels,
        unit_bytes=unit_bytes,
        smallest=hidden.shape[-1],
        largest=LARGEST_ATTENTION_BATCH // batch,
    ) as call:
        if execution.runner.shape_only:
            return
        positions_FD = _position_embedding(model, tokens_BFPD)
        spatial_share = 1.0 - temporal_share(model.time_mixer, tokens_NPD.dtype)
        for chunk in execution.chunks(call):
            spatial_BPFD = tokens_BFPD[:, :, chunk].transpose(1, 2)
            temporal_BPFD = torch.add(spatial_BPFD.contiguous(), positions_FD)
            apply_temporal_block(block, temporal_BPFD.flatten(0, 1), context_BTD)
            temporal_BPFD.lerp_(spatial_BPFD, spatial_share)
            if is_last:
                added_BPFC = model.proj_out(temporal_BPFD)
                by_pixel(execution, hidden)[..., chunk].add_(added_BPFC.permute(0, 2, 3, 1))
                del added_BPFC
            else:
                spatial_BPFD.copy_(temporal_BPFD)
            del temporal_BPFD  # or it would be alive beside the next chunk's


def _position_embedding(model: Any, tokens_BFPD: torch.Tensor) -> torch.Tensor:
    """Return the embedding of each frame's position in the clip (F, D)."""
    numbers = torch.arange(tokens_BFPD.shape[1], device=tokens_BFPD.device)
    return model.time_pos_embed(model.time_proj(numbers).to(tokens_BFPD.dtype))
