"""A Wan transformer's two ends: latents as tokens, one for each patch, and patches as latents.

Legend: B batch, S tokens of the video, D width of a token, C channels, T/H/W latent frames, height and width, P numbers
of a patch.
"""

from __future__ import annotations

from typing import Any

import torch

from ...chunking.execution import Execution


def embedded(model: Any, execution: Execution, sample_BCTHW: torch.Tensor) -> torch.Tensor:
    """The first hidden state (B, S, D): patches of the sample, embedded some latent frames at a time."""
    batch, _, frames, height, width = sample_BCTHW.shape
    embed = model.patch_embedding
    deep, high, wide = model.config.patch_size
    of_frame = (height // high) * (width // wide)
    total = frames // deep
    tokens_BSD = sample_BCTHW.new_empty(batch, total * of_frame, embed.out_channels)
    unit_bytes = batch * of_frame * embed.out_channels * sample_BCTHW.element_size()
    with execution.layer("patches", embed, total=total, unit_bytes=unit_bytes, result_apart=True) as call:
        for piece in () if execution.runner.shape_only else execution.chunks(call):
            made = embed(sample_BCTHW[:, :, piece.start * deep : piece.stop * deep])
            tokens_BSD[:, piece.start * of_frame : piece.stop * of_frame] = made.flatten(2).transpose(1, 2)
            del made
    return tokens_BSD


def unpatched(patches_BSP: torch.Tensor, shape: tuple[int, ...], patch: tuple[int, int, int]) -> torch.Tensor:
    """The prediction (B, C, T, H, W) that the patches make up."""
    batch, _, *sizes = shape
    counts = [size // side for size, side in zip(sizes, patch, strict=True)]
    parts = patches_BSP.view(batch, *counts, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return parts.flatten(6, 7).flatten(4, 5).flatten(2, 3)
