"""Animated previews, sent where the host expects a still image."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..i2v_core.families.preview import preview_frames

SIDE_PIXELS = 384
_FRAME_MILLISECONDS = 125
_MAX_FRAMES = 32


class AnimatedPreview(Image.Image):
    """An image that saves itself as an animation.

    The host sends whatever bytes `save` writes, and browsers detect the format from the bytes, not from its name. So
    the page shows all frames moving without a script of its own.
    """

    def __init__(self, frames: list[Image.Image]) -> None:
        super().__init__()
        self._frames = frames
        self.im = frames[0].im
        self._mode, self._size = frames[0].mode, frames[0].size

    @classmethod
    def of_latents(cls, latents_1CThw: Tensor, factors: Tensor) -> AnimatedPreview:
        """Make a preview from the current estimate of the clean latents, enlarged."""
        pixels = (preview_frames(latents_1CThw, factors) * 255).byte().numpy()
        return cls([_enlarged(frame) for frame in pixels])

    def save(self, fp: Any, format: str | None = None, **_: Any) -> None:  # noqa: ARG002
        """Write an animated WebP, whatever `format` says."""
        self._frames[0].save(
            fp, format="WEBP", save_all=True, append_images=self._frames[1:], duration=_FRAME_MILLISECONDS, loop=0
        )

    def for_host(self) -> tuple[str, Image.Image, None]:
        """Return the preview as the host's progress bar expects it: format, image, and no maximum size."""
        return ("JPEG", self, None)


class FinishedFrames:
    """Small copies of finished frames for a preview; when there are too many, every second one is dropped."""

    def __init__(self) -> None:
        self._kept: list[Image.Image] = []
        self._seen, self._every = 0, 1

    def add(self, frames_FHWC: Tensor) -> None:
        """Add frames with values in 0…1."""
        for frame_HWC in frames_FHWC:
            if self._seen % self._every == 0:
                small = Image.fromarray((frame_HWC * 255).byte().numpy())
                small.thumbnail((SIDE_PIXELS, SIDE_PIXELS))
                self._kept.append(small)
            self._seen += 1
            if len(self._kept) > _MAX_FRAMES:
                self._kept, self._every = self._kept[::2], 2 * self._every

    def preview(self) -> AnimatedPreview | None:
        return AnimatedPreview(list(self._kept)) if self._kept else None


def _enlarged(pixels_hw3: np.ndarray[Any, Any]) -> Image.Image:
    frame = Image.fromarray(pixels_hw3)
    scale = SIDE_PIXELS / max(frame.size)
    return frame.resize((round(frame.width * scale), round(frame.height * scale)), Image.Resampling.BILINEAR)
