"""Measurements of a shape in a clip: its position, its area and its colour.

Shapes: ``frame_CHW`` in [-1, 1], ``clip_FCHW`` likewise; lengths are fractions of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from training.demo_model.clips import Point, Rgb, Sprite
from training.demo_model.scenes import DIRECTIONS

# A pixel belongs to the shape if its colour is at most this far away (distance in RGB, each in [0, 1]).
NEAR = 0.30
# Followed: at least half of the requested travel along the direction, and less than a quarter across it.
ALONG, ASIDE = 0.5, 0.25
# Lost: less than this share of the shape's initial area is left at the end.
LOST = 0.4
# Kept: the colour at the end is within this distance (RGB) of the colour in the input picture.
COLOUR_KEPT = 0.15


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A shape found in one frame. Centre and colour are meaningless if its area is 0."""

    centre: Point
    area: float
    rgb: Rgb


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Comparison of one clip with its prompt."""

    moved: Point
    followed: bool
    lost: bool
    colour_distance: float
    first_frame_psnr: float


def see(frame_CHW: torch.Tensor, rgb: Rgb) -> Seen:
    """Locate the pixels near a colour, weighted by how near they are."""
    frame = frame_CHW / 2 + 0.5
    distance = (frame - torch.tensor(rgb).view(3, 1, 1)).norm(dim=0)
    weight = (1 - distance / NEAR).clamp(min=0)
    total = weight.sum().clamp(min=1e-6)
    size = frame.shape[-1]
    line = (torch.arange(size) + 0.5) / size
    x, y = (weight.sum(0) * line).sum() / total, (weight.sum(1) * line).sum() / total
    r, g, b = ((frame * weight).sum((1, 2)) / total).tolist()
    return Seen(centre=(float(x), float(y)), area=float((weight > 0).float().mean()), rgb=(r, g, b))


def judge(clip_FCHW: torch.Tensor, picture_CHW: torch.Tensor, sprite: Sprite, action: str, travel: float) -> Verdict:
    """Follow the shape that a prompt names from the input picture to the clip's last frame."""
    before, after = see(picture_CHW, sprite.rgb), see(clip_FCHW[-1], sprite.rgb)
    dx, dy = after.centre[0] - before.centre[0], after.centre[1] - before.centre[1]
    colour = sum((a - b) ** 2 for a, b in zip(after.rgb, before.rgb, strict=True)) ** 0.5
    return Verdict(
        moved=(dx, dy),
        followed=follows((dx, dy), action, travel),
        lost=after.area < LOST * before.area,
        colour_distance=colour,
        first_frame_psnr=psnr(clip_FCHW[0], picture_CHW),
    )


def follows(moved: Point, action: str, travel: float) -> bool:
    if action == "stays":
        return max(abs(moved[0]), abs(moved[1])) < ASIDE * travel
    ux, uy = DIRECTIONS[action]
    along = moved[0] * ux + moved[1] * uy
    aside = abs(moved[0] * uy) + abs(moved[1] * ux)
    return along >= ALONG * travel and aside < ASIDE * travel


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the PSNR in dB, for values in [-1, 1]."""
    mse = (one - other).square().mean().clamp(min=1e-12)
    return float(10 * torch.log10(4 / mse))
