"""Constants of model families, and sizes of videos and latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import BadInputError


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSize:
    """A video's size in pixel space."""

    width_pixels: int
    height_pixels: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width_pixels}×{self.height_pixels}×{self.frames}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSize:
    """A video's size in latent space, which the denoiser works in."""

    channels: int
    latent_frames: int
    latent_height: int
    latent_width: int

    @property
    def shape_bcthw(self) -> tuple[int, int, int, int, int]:
        """Shape of latents with B = 1."""
        return (1, self.channels, self.latent_frames, self.latent_height, self.latent_width)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerChoice:
    """A scheduler that a family can be sampled with."""

    name: str
    """The name that users know it by."""

    diffusers_class: str

    renamed: tuple[tuple[str, str], ...] = ()
    """Keys of the model's scheduler config that this scheduler knows by another name: (config's, scheduler's)."""

    changes: tuple[tuple[str, str | int | float | bool | None], ...] = ()
    """Values to set in the model's scheduler config."""


AUTO_SCHEDULER = "auto"
"""The name by which users choose the family's own scheduler."""

OptionalInput = Literal["text", "negative_text", "fps", "motion_bucket", "noise_augmentation"]
"""Fields of a `base.Prompt` that not every family uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyFacts:
    """Constants of one family."""

    name: str
    display_name: str

    spatial_compression: int
    """Pixels a latent pixel, in height and width."""

    temporal_compression: int
    """Pixel frames a latent frame; the number of frames must be k × this + 1 (any number if it is 1)."""

    anchor_frames: int | None
    """First latent frames that the denoiser needs beside any window of others; None: it needs all frames."""

    latent_channels: int

    size_multiple: int
    """Number that width and height in pixels must be divisible by."""

    min_side_pixels: int
    default_size: VideoSize
    default_fps: int
    default_cfg: float

    optional_inputs: frozenset[OptionalInput]
    """Inputs beside the picture that the family uses."""

    schedulers: tuple[SchedulerChoice, ...]
    """Schedulers that the family can be sampled with, its own first."""

    has_skips: bool = True
    """Whether the denoiser has skip connections, which can be offloaded."""

    fp16_unsafe: frozenset[str] = frozenset()
    """Components whose values exceed fp16's range."""

    from_files: frozenset[str] = frozenset()
    """Components whose weights may come from a file outside of the model's folder."""

    table_sizes: tuple[VideoSize, ...] = ()
    """Sizes that memory tables show; empty: the default size."""

    @property
    def latent_dimensions(self) -> int:
        """Dimensions of the host's LATENT: 4 (frames, C, h, w) for an image autoencoder, 5 (1, C, T, h, w) for a
        video's.
        """
        return 4 if self.temporal_compression == 1 else 5

    def scheduler(self, name: str) -> SchedulerChoice:
        """Return the family's scheduler of this name. Raises `BadInputError` if there is none."""
        if name == AUTO_SCHEDULER:
            return self.schedulers[0]
        for choice in self.schedulers:
            if choice.name == name:
                return choice
        names = ", ".join((AUTO_SCHEDULER, *(choice.name for choice in self.schedulers)))
        raise BadInputError(f"{self.display_name} has no scheduler '{name}'", f"choose one of {names}")

    def check(self, size: VideoSize) -> None:
        """Raise `BadInputError` unless the family can make a video of this size."""
        for name, side_pixels in (("width", size.width_pixels), ("height", size.height_pixels)):
            if side_pixels < self.min_side_pixels:
                raise BadInputError(
                    f"a {name} of {side_pixels} pixels is too small",
                    f"use at least {self.min_side_pixels} pixels",
                )
            if side_pixels % self.size_multiple:
                below = side_pixels - side_pixels % self.size_multiple
                raise BadInputError(
                    f"a {name} of {side_pixels} pixels is not divisible by {self.size_multiple}",
                    f"use {max(below, self.min_side_pixels)} or {below + self.size_multiple}",
                )
        if size.frames < 1:
            raise BadInputError(f"a video of {size.frames} frames is not possible", "ask for at least 1 frame")
        if (size.frames - 1) % self.temporal_compression:
            below = size.frames - (size.frames - 1) % self.temporal_compression
            raise BadInputError(
                f"{self.display_name} cannot make {size.frames} frames",
                f"use {below} or {below + self.temporal_compression}",
            )

    def latent_size(self, size: VideoSize) -> LatentSize:
        """Return the size in latent space of a video."""
        return LatentSize(
            channels=self.latent_channels,
            latent_frames=(size.frames - 1) // self.temporal_compression + 1,
            latent_height=size.height_pixels // self.spatial_compression,
            latent_width=size.width_pixels // self.spatial_compression,
        )

    def pixel_frames(self, latent_frames: int) -> int:
        """Return how many frames of video latent frames decode to."""
        return (latent_frames - 1) * self.temporal_compression + 1
