"""Fitting a picture to a size: scale it to cover the size, and crop its middle.

Shape legend: H/W height and width in pixel space, 3 colour channels last.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import BadInputError

_MOST_SCALED_PIXELS = 1 << 30
"""Largest picture before it is cropped: one of a few by thousands of pixels would be scaled to fill all memory."""


def first_picture(image_FHWC: Tensor) -> Image.Image:
    """Return frame 0 of (F, H, W, 1, 3 or 4) in 0…1 as an 8-bit RGB picture; transparency is dropped.

    Raises:
        BadInputError: there is no frame, another number of channels, or a value that is not finite.
    """
    if image_FHWC.ndim != 4 or image_FHWC.shape[0] < 1 or image_FHWC.shape[-1] not in (1, 3, 4):
        raise BadInputError(
            f"the image has shape {tuple(image_FHWC.shape)}", "connect an IMAGE of shape (frames, height, width, 3)"
        )
    picture_HWC = image_FHWC[0].float().cpu()
    if not torch.isfinite(picture_HWC).all():
        raise BadInputError("the image holds values that are NaN or infinite", "check the node that made it")
    if picture_HWC.shape[-1] == 1:
        picture_HWC = picture_HWC.expand(-1, -1, 3)
    pixels: np.ndarray[Any, Any] = (picture_HWC[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels)


def cover(picture: Image.Image, width_pixels: int, height_pixels: int) -> Image.Image:
    """Return the picture scaled to cover the size, cropped to its middle.

    Scaled sides are rounded up, so that no border row is left empty.

    Raises:
        BadInputError: the picture's sides differ so much that next to nothing of it would be left.
    """
    scale = min(picture.width / width_pixels, picture.height / height_pixels)
    # The tolerance keeps an exact fit exact: 1280 / (1280 / 704 × 1) is not always 704 in floating point.
    scaled = tuple(math.ceil(side / scale - 1e-6) for side in picture.size)
    if scaled[0] * scaled[1] > _MOST_SCALED_PIXELS:
        raise BadInputError(
            f"the image is {picture.width}×{picture.height} pixels, of which {width_pixels}×{height_pixels} would keep "
            "next to nothing",
            "cut it to about the video's shape first",
        )
    resized = picture.resize((scaled[0], scaled[1]), resample=Image.Resampling.BOX)
    left, top = (resized.width - width_pixels) // 2, (resized.height - height_pixels) // 2
    return resized.crop((left, top, left + width_pixels, top + height_pixels))


def to_tensor(picture: Image.Image) -> Tensor:
    """Return a picture as a tensor (1, 3, H, W) in 0…1, in fp32."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255  # pyright: ignore[reportUnknownMemberType]
