"""The nearest clip that would fit, in pixels and frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...i2v_core.units import format_gib

Fits = Callable[[Sequence[int]], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class SuggestedSizes:
    """A requested clip, and the largest that fits: in fewer frames, or in a smaller picture None: none."""

    asked: str
    frames: int | None
    size: str | None

    def remedy(self, needed_bytes: int) -> str:
        ways = [f"{self.frames} frames"] if self.frames else []
        ways += [self.size] if self.size else []
        return "use " + ", or ".join([*ways, f"a budget of {format_gib(needed_bytes)}"])


def suggested_sizes(latent_format: Any, shape: Sequence[int], fits: Fits) -> SuggestedSizes:
    """Bisects frames, and then picture sizes of the same proportions, for the largest latent that fits.

    Args:
        latent_format: core's, of the model.
        shape: of the latent that was asked for, (B, C, T, h, w).
        fits: whether a latent of a shape fits.
    """
    spatial = int(getattr(latent_format, "spacial_downscale_ratio", None) or 8)
    temporal = int(getattr(latent_format, "temporal_downscale_ratio", None) or 1)
    if len(shape) != 5:
        return SuggestedSizes(asked=f"a latent of {tuple(shape)}", frames=None, size=None)
    batch, channels, latent_frames, height, width = shape

    def pixels(height: int, width: int) -> str:
        return f"{width * spatial}×{height * spatial}"

    def frames_of(latent_frames: int) -> int:
        return (latent_frames - 1) * temporal + 1

    shorter = _largest(latent_frames - 1, lambda count: fits((batch, channels, count, height, width)))
    # Even sides, since the models' patches are two latent pixels wide.
    heights = range(2, height, 2)

    def scaled(step: int) -> tuple[int, int]:
        smaller = heights[step - 1]
        return smaller, max(2, round(width * smaller / height / 2) * 2)

    smaller = _largest(len(heights), lambda step: fits((batch, channels, latent_frames, *scaled(step))))
    return SuggestedSizes(
        asked=f"{pixels(height, width)}×{frames_of(latent_frames)}",
        frames=frames_of(shorter) if shorter else None,
        size=pixels(*scaled(smaller)) if smaller else None,
    )


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest of 1 to `most` that fits, if all below it do; 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
