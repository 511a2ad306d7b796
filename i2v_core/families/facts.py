"""What is fixed about a model family: compression, frame rule, channels, defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import BadInputError


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSize:
    """The video asked for, in pixel space."""

    width_pixels: int
    height_pixels: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width_pixels}×{self.height_pixels}×{self.frames}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSize:
    """The same video in latent space: what the denoiser works on."""

    channels: int
    latent_frames: int
    latent_height: int
    latent_width: int

    @property
    def shape_bcthw(self) -> tuple[int, int, int, int, int]:
        return (1, self.channels, self.latent_frames, self.latent_height, self.latent_width)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerChoice:
    """A scheduler that suits a family: the name that users know it by, and what diffusers calls its class.

    `changes` are made to the model's own scheduler config, in which `renamed` are keys that it has under other names:
    theirs, and the scheduler's.
    """

    name: str
    diffusers_class: str
    renamed: tuple[tuple[str, str], ...] = ()
    changes: tuple[tuple[str, str | int | float | bool | None], ...] = ()


AUTO_SCHEDULER = "auto"
"""The user's word for the family's own scheduler."""

OptionalInput = Literal["text", "negative_text", "fps", "motion_bucket", "noise_augmentation"]
"""The fields of a `base.Prompt` that not every family has a use for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyFacts:
    """Constants of one family.

    `size_multiple` is what width and height in pixels must be divisible by; frames must be
    `temporal_compression`·k + 1 (any number where that is 1). `anchor_frames` are the clip's first latent frames that
    the denoiser must see even where it is given a window of the others; None: it must see the whole clip.
    `has_skips` says whether the denoiser has skip connections, which can be parked.
    `takes` are the inputs beside the picture that it has a use for. `schedulers` are those that it can be sampled with,
    its own first. `fp16_unsafe` are components whose numbers fp16 cannot hold, `from_files` those whose weights may
    come from a file outside of the model's folder. `table_sizes` are those that memory tables show; without any, the
    default size.
    """

    name: str
    display_name: str
    spatial_compression: int
    temporal_compression: int
    anchor_frames: int | None
    latent_channels: int
    size_multiple: int
    min_side_pixels: int
    default_size: VideoSize
    default_fps: int
    default_cfg: float
    optional_inputs: frozenset[OptionalInput]
    schedulers: tuple[SchedulerChoice, ...]
    has_skips: bool = True
    fp16_unsafe: frozenset[str] = frozenset()
    from_files: frozenset[str] = frozenset()
    table_sizes: tuple[VideoSize, ...] = ()

    @property
    def latent_dimensions(self) -> int:
        """Of the host's LATENT: 4 (frames, C, h, w) for an image autoencoder, 5 (1, C, T, h, w) for a video's."""
        return 4 if self.temporal_compression == 1 else 5

    def scheduler(self, name: str) -> SchedulerChoice:
        """The family's scheduler of this name. Raises `BadInputError` where there is none."""
        if name == AUTO_SCHEDULER:
            return self.schedulers[0]
        for choice in self.schedulers:
            if choice.name == name:
                return choice
        names = ", ".join((AUTO_SCHEDULER, *(choice.name for choice in self.schedulers)))
        raise BadInputError(f"{self.display_name} has no scheduler '{name}'", f"choose one of {names}")

    def check(self, size: VideoSize) -> None:
        """Raise `BadInputError` unless a video of this size can be made by the family."""
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
        return LatentSize(
            channels=self.latent_channels,
            latent_frames=(size.frames - 1) // self.temporal_compression + 1,
            latent_height=size.height_pixels // self.spatial_compression,
            latent_width=size.width_pixels // self.spatial_compression,
        )

    def pixel_frames(self, latent_frames: int) -> int:
        return (latent_frames - 1) * self.temporal_compression + 1
