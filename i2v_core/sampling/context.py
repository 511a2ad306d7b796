"""Context windows: run the denoiser on a few latent frames of the clip at a time, and blend the predictions.

Approximate, because temporal layers see a window instead of the whole clip. Each step's prediction is the weighted mean
of its windows' predictions, as in MultiDiffusion (Bar-Tal et al., 2023), here along time.

Shape legend: B batch, C latent channels, T latent frames, H/W latent size, t frames of one window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..families import Family, TensorMap
from .loop import Denoise


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextWindows:
    """Division of a clip into overlapping windows along time."""

    context_length: int
    """Latent frames of a window."""

    context_overlap: int
    """Latent frames that neighbouring windows share."""

    def __post_init__(self) -> None:
        if not 0 <= self.context_overlap < self.context_length:
            raise ValueError(f"an overlap of {self.context_overlap} does not fit windows of {self.context_length}")

    def count(self, frames: int, anchor_frames: int | None) -> int:
        """Return the number of windows of a clip of `frames` latent frames. No anchor (None) means a single window."""
        return 1 if anchor_frames is None else len(self.cut(frames, anchor_frames))

    def cut(self, frames: int, anchor_frames: int) -> tuple[Window, ...]:
        """Return the windows of a clip, in order; a single one if the clip is no longer than a window.

        `anchor_frames` is how many of the clip's first frames every window sees; they count towards its length. The
        last window is as long as the others, so it may share more frames with the one before.

        Raises:
            ValueError: anchor and overlap would leave a window no frames of its own.
        """
        own_length = self.context_length - anchor_frames
        if self.context_overlap >= own_length:
            raise ValueError(f"{self} leaves nothing beside {anchor_frames} anchor frames")
        windows = [Window(start=0, stop=min(self.context_length, frames), anchor_frames=0)]
        while windows[-1].stop < frames:
            start = min(windows[-1].stop - self.context_overlap, frames - own_length)
            windows.append(Window(start=start, stop=start + own_length, anchor_frames=anchor_frames))
        return tuple(windows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One context window."""

    start: int
    """First latent frame that the window predicts."""

    stop: int
    """End of the predicted frames (exclusive)."""

    anchor_frames: int
    """Number of the clip's first frames that are input beside them, whose prediction is dropped."""

    @property
    def seen(self) -> list[int]:
        """Indices of the frames that the denoiser gets."""
        return [*range(self.anchor_frames), *range(self.start, self.stop)]

    def weights(self, overlap: int) -> Tensor:
        """Return positive weights (t,) in fp32: 1, falling linearly over `overlap` frames towards both edges."""
        frames = torch.arange(self.stop - self.start, dtype=torch.float32)
        to_edge = torch.minimum(frames, frames.flip(0)) + 1
        return (to_edge / (overlap + 1)).clamp_(max=1)


def blend_weights(windows: tuple[Window, ...], overlap: int) -> list[Tensor]:
    """Return the weights (t,) of each window, scaled so that the weights of every frame add up to 1."""
    total = torch.zeros(windows[-1].stop)
    for window in windows:
        total[window.start : window.stop] += window.weights(overlap)
    return [window.weights(overlap) / total[window.start : window.stop] for window in windows]


def in_windows(denoise: Denoise, family: Family, context: ContextWindows, frames: int) -> Denoise:
    """Wrap a denoiser to run window by window on clips of `frames` latent frames.

    Returns `denoise` itself if one window is enough, or if the family's denoiser must see the whole clip.
    """
    anchor_frames = family.facts.anchor_frames
    if anchor_frames is None or context.count(frames, anchor_frames) == 1:
        return denoise
    windows = context.cut(frames, anchor_frames)
    weights = blend_weights(windows, context.context_overlap)

    def predict(latents_BCTHW: Tensor, timestep: Tensor, inputs: TensorMap) -> Tensor:
        blended_BCTHW = torch.zeros_like(latents_BCTHW, dtype=torch.float32, memory_format=torch.contiguous_format)
        for window, weights_t in zip(windows, weights, strict=True):
            seen = torch.tensor(window.seen, device=latents_BCTHW.device)
            prediction = denoise(latents_BCTHW[:, :, seen], timestep, family.inputs_for_frames(inputs, seen))
            own = prediction[:, :, window.anchor_frames :].float()
            blended_BCTHW[:, :, window.start : window.stop].addcmul_(own, weights_t.to(own.device).view(-1, 1, 1))
            del prediction, own  # freed before the next window runs
        return blended_BCTHW.to(latents_BCTHW.dtype)

    return predict
