"""The nearest clip that would fit, in pixels and frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...i2v_core.units import format_gib


@dataclass(frozen=True, slots=True)
class LatentClip:
    """The latent of a clip: a video's, and what is sampled with it, such as audio."""

    shapes: tuple[tuple[int, ...], ...]
    """(B, C, T, h, w) of the video, and those of the others."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape that samplers see: several parts are packed into one row of numbers."""
        if len(self.shapes) == 1:
            return self.shapes[0]
        return (self.shapes[0][0], 1, sum(math.prod(it[1:]) for it in self.shapes))

    def with_frames(self, latent_frames: int) -> LatentClip:
        """A clip of another length; what is sampled with the video follows."""
        (batch, channels, before, *size), *others = self.shapes
        video = (batch, channels, latent_frames, *size)
        return replace(self, shapes=(video, *(_resized(it, latent_frames / before) for it in others)))

    def with_size(self, height: int, width: int) -> LatentClip:
        """A clip of another picture size, in latent pixels."""
        video, *others = self.shapes
        return replace(self, shapes=((*video[:3], height, width), *others))


Fits = Callable[[LatentClip], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class SuggestedSizes:
    """A requested clip, and the largest that fit: in fewer frames, or in a smaller picture; None: none."""

    asked: str
    frames: int | None
    size: str | None

    def remedy(self, needed_bytes: int) -> str:
        ways = [f"{self.frames} frame{'s' if self.frames != 1 else ''}"] if self.frames else []
        ways += [self.size] if self.size else []
        return "use " + ", or ".join([*ways, f"a budget of {format_gib(needed_bytes)}"])


@dataclass(frozen=True, slots=True)
class _Grid:
    """Places of a model's latents on the pixels of a clip.

    Latent frames `first`, `first + step`, … stand for frames `first_frames`, `first_frames + step_frames`, …
    """

    pixels: int
    first: int
    step: int
    first_frames: int
    step_frames: int

    def frames(self, latent_frames: int) -> int:
        return self.first_frames + (latent_frames - self.first) * self.step_frames // self.step

    def size(self, height: int, width: int) -> str:
        return f"{width * self.pixels}×{height * self.pixels}"


def suggested_sizes(latent_format: Any, clip: LatentClip, fits: Fits) -> SuggestedSizes:
    """Bisects frames, and then picture sizes of the same proportions, for the largest clip that fits.

    Args:
        latent_format: core's, of the model.
        clip: what was asked for.
    """
    if len(clip.shapes[0]) != 5:
        return SuggestedSizes(asked=f"a latent of {clip.shape}", frames=None, size=None)
    grid = _grid(latent_format)
    _, _, latent_frames, height, width = clip.shapes[0]
    lengths = range(grid.first, latent_frames, grid.step)
    shorter = _largest(lengths, lambda count: fits(clip.with_frames(count)))
    # Even sides, since the models' patches are two latent pixels wide.
    heights = range(2, height, 2)

    def scaled(height_: int) -> tuple[int, int]:
        return height_, max(2, round(width * height_ / height / 2) * 2)

    lower = _largest(heights, lambda height_: fits(clip.with_size(*scaled(height_))))
    return SuggestedSizes(
        asked=f"{grid.size(height, width)}×{grid.frames(latent_frames)}",
        frames=None if shorter is None else grid.frames(shorter),
        size=None if lower is None else grid.size(*scaled(lower)),
    )


def _grid(latent_format: Any) -> _Grid:
    names = [it.__name__ for it in type(latent_format).__mro__]
    pixels = int(getattr(latent_format, "spacial_downscale_ratio", None) or 8)
    if "MiniMaxH3Video" in names:  # windows of 17 frames, each 5 latent frames, after the first 5 frames' 2
        return _Grid(pixels, first=2, step=5, first_frames=5, step_frames=17)
    temporal = getattr(latent_format, "temporal_downscale_ratio", None)
    if temporal is None:  # before ComfyUI 0.24
        is_video = getattr(latent_format, "latent_dimensions", 2) == 3
        temporal = (8 if "LTXV" in names else 4) if is_video else 1
    return _Grid(pixels, first=1, step=1, first_frames=1, step_frames=int(temporal))


def _resized(shape: tuple[int, ...], ratio: float) -> tuple[int, ...]:
    """A shape whose axis of time, its longest, is scaled."""
    time = max(range(2, len(shape)), key=lambda axis: shape[axis])
    return (*shape[:time], max(1, round(shape[time] * ratio)), *shape[time + 1 :])


def _largest(values: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The last of ascending values that fits, if all before it do; None where none does."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(values[middle - 1]) else (low, middle - 1)
    return values[low - 1] if low else None
