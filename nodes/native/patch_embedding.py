"""The embedding of a video's latents as patches, without the copies that a whole video takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .calls import CallState


def embedded_by_frame(
    convolution: Callable[[Tensor], Tensor],
    latents_BCTHW: Tensor,
    step: int,
    state: CallState,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Embedded patches (B, T, h, w, D), laid out in memory as tokens, and made a latent frame at a time.

    Args:
        convolution: embeds latents (B, C, T, H, W) as patches (B, D, T, h, w) that do not overlap.
        step: latent frames of one patch.
        dtype: of the result; None: as the convolution gives it.
    """
    out: Tensor | None = None
    count = latents_BCTHW.shape[2] // step
    for frame in range(count):
        state.on_chunk()
        patches_BDhw = convolution(latents_BCTHW[:, :, frame * step : (frame + 1) * step])[:, :, 0]
        if out is None:
            batch, width, height, length = patches_BDhw.shape
            out = patches_BDhw.new_empty(batch, count, height, length, width, dtype=dtype or patches_BDhw.dtype)
        out[:, frame] = patches_BDhw.permute(0, 2, 3, 1)
        del patches_BDhw
    assert out is not None
    return out
