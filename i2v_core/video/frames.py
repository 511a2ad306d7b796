"""Frames as the rest of the pack has them, into pixels as a file has them.

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
    """Every frame as 8-bit pixels (H, W, 3), one at a time, so that no second copy of them all is ever there.

    Takes float frames in 0…1, whose values beyond are clipped, or uint8 frames; a single frame may come without F.
    Alpha is left out.

    Raises:
        BadInputError: another shape or dtype, or values that are not finite.
    """
    if frames_FHWC.ndim == 3:
        frames_FHWC = frames_FHWC[None]
    if frames_FHWC.ndim != 4 or frames_FHWC.shape[-1] not in {3, 4} or 0 in frames_FHWC.shape[1:]:
        raise BadInputError(
            f"frames of shape {tuple(frames_FHWC.shape)} are no video", "give frames as (frames, height, width, 3)"
        )
    if not (frames_FHWC.is_floating_point() or frames_FHWC.dtype == torch.uint8):
        raise BadInputError(f"frames of {frames_FHWC.dtype} are no pixels", "give floats in 0…1, or uint8")
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
    """The frame with its last row and column repeated where there is an odd number of them."""
    height, width, _ = pixels_HW3.shape
    return np.pad(pixels_HW3, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
