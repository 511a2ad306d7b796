"""Context windows: the denoiser sees some latent frames of the clip at a time, and its predictions are blended.

Approximate: temporal layers see a window instead of the clip. Each step's prediction is the weighted mean of the
windows', as in MultiDiffusion (Bar-Tal et al., 2023), here along time.

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
    """How a clip is cut: windows of `context_length` latent frames, of which neighbours share `context_overlap`."""

    context_length: int
    context_overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.context_overlap < self.context_length:
            raise ValueError(f"an overlap of {self.context_overlap} does not fit windows of {self.context_length}")

    def count(self, frames: int, anchor_frames: int | None) -> int:
        """How many windows a clip of so many latent frames has: one where the denoiser must see it all."""
        return 1 if anchor_frames is None else len(self.cut(frames, anchor_frames))

    def cut(self, frames: int, anchor_frames: int) -> tuple[Window, ...]:
        """The windows of a clip, in order; one where the clip is no longer than a window.

        `anchor_frames` are the clip's first frames that every window sees: they take their part of its length. The
        last window is as long as the others, and so may share more with the one before.

        Raises:
            ValueError: a window would be all anchor and overlap.
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
    """Latent frames from `start` to `stop`, which are predicted, and the first frames of the clip seen beside them."""

    start: int
    stop: int
    anchor_frames: int

    @property
    def seen(self) -> list[int]:
        return [*range(self.anchor_frames), *range(self.start, self.stop)]

    def weights(self, overlap: int) -> Tensor:
        """(t,) in fp32, above zero: 1, falling linearly over `overlap` frames towards both edges."""
        frames = torch.arange(self.stop - self.start, dtype=torch.float32)
        to_edge = torch.minimum(frames, frames.flip(0)) + 1
        return (to_edge / (overlap + 1)).clamp_(max=1)


def blend_weights(windows: tuple[Window, ...], overlap: int) -> list[Tensor]:
    """(t,) of each window, such that those of every frame add up to 1."""
    total = torch.zeros(windows[-1].stop)
    for window in windows:
        total[window.start : window.stop] += window.weights(overlap)
    return [window.weights(overlap) / total[window.start : window.stop] for window in windows]


def in_windows(denoise: Denoise, family: Family, context: ContextWindows, frames: int) -> Denoise:
    """A denoiser for clips of `frames` latent frames that sees a window at a time; `denoise` itself where one is enough
    or the family's must see the whole clip.
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
            del prediction, own  # not beside the next window
        return blended_BCTHW.to(latents_BCTHW.dtype)

    return predict
