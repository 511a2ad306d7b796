"""Converts frame tensors to the 8-bit pixels that video files store.

Shape legend: F frames, H/W height and width in pixel space, C channels (3, or 4 with alpha).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import BadInputError

Pixels = NDArray[np.uint8]


def each_frame(frames_FHWC: Tensor) -> Iterator[Pixels]:
    """Yield each frame as 8-bit pixels (H, W, 3); one at a time, so that memory never holds a second copy of them all.

    Takes float frames in 0…1 (values outside are clipped) or uint8 frames; a single frame may come without F. Alpha is
    dropped.

    Raises:
        BadInputError: the shape or dtype is not that of frames, or a value is not finite.
    """
    if frames_FHWC.ndim == 3:
        frames_FHWC = frames_FHWC[None]
    if frames_FHWC.ndim != 4 or frames_FHWC.shape[-1] not in {3, 4} or 0 in frames_FHWC.shape[1:]:
        raise BadInputError(
            f"frames of shape {tuple(frames_FHWC.shape)} are not a video", "give frames as (frames, height, width, 3)"
        )
    if not (frames_FHWC.is_floating_point() or frames_FHWC.dtype == torch.uint8):
        raise BadInputError(f"frames of {frames_FHWC.dtype} are not pixels", "give floats in 0…1, or uint8")
    for frame_HWC in frames_FHWC:
        yield _pixels(frame_HWC[..., :3])


def _pixels(frame_HW3: Tensor) -> Pixels:
    if frame_HW3.dtype != torch.uint8:
        if not torch.isfinite(frame_HW3).all():
            raise BadInputError("a frame holds values that are NaN or infinite", "check the node that made it")
        frame_HW3 = (frame_HW3.float() * 255).round_().clamp_(0, 255).to(torch.uint8)
    pixels: Any = frame_HW3.detach().cpu().contiguous().numpy()
    return pixels


def with_even_sides(pixels_HW3: Pixels) -> Pixels:
    """Repeat the last row or column of a frame with an odd number of them."""
    height, width, _ = pixels_HW3.shape
    return np.pad(pixels_HW3, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
