"""Drawing of synthetic pictures: coloured shapes on a plain or textured ground.

Lengths are fractions of the picture, x to the right and y down, so a scene can be drawn at any size.
Shapes: ``picture_CHW`` and ``clip_FCHW`` are float32 in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

Rgb = tuple[float, float, float]
Point = tuple[float, float]
Plane = NDArray[np.float32]

SHAPES = ("circle", "square", "triangle")
COLOURS: dict[str, Rgb] = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.60, 0.15, 0.72),
    "cyan": (0.10, 0.80, 0.85),
}
GROUNDS = ("plain", "gradient", "stripes", "checks", "blobs")

# Never drawn in training, so that the benchmark can ask for combinations the model has not seen.
UNSEEN = frozenset({("red", "triangle"), ("cyan", "circle"), ("purple", "square")})

# Half a pixel of blur at 96 pixels: a small VAE spends too much on hard edges.
EDGE = 0.75 / 96


@dataclass(frozen=True, kw_only=True, slots=True)
class Sprite:
    """One shape at the start of the clip, with the names that prompts use for it."""

    shape: str
    colour: str
    rgb: Rgb
    centre: Point
    radius: float

    def moved(self, dx: float, dy: float) -> Sprite:
        return replace(self, centre=(self.centre[0] + dx, self.centre[1] + dy))


@dataclass(frozen=True, kw_only=True, slots=True)
class Ground:
    """Background behind the shapes: two similar colours, mixed by a coarse pattern."""

    kind: str
    first: Rgb
    second: Rgb
    angle: float
    period: float
    phase: float


def draw_ground(ground: Ground, size: int) -> torch.Tensor:
    """Draw a picture (3, size, size) in [0, 1]."""
    x, y = _grid(size)
    along = np.cos(ground.angle) * x + np.sin(ground.angle) * y
    across = np.cos(ground.angle) * y - np.sin(ground.angle) * x
    turn = 2 * np.pi / ground.period
    if ground.kind == "plain":
        mix = np.zeros_like(x)
    elif ground.kind == "gradient":
        mix = (along - along.min()) / (along.max() - along.min())
    elif ground.kind == "stripes":
        mix = _soft_step(np.sin(turn * along + ground.phase))
    elif ground.kind == "checks":
        mix = _soft_step(np.sin(turn * along + ground.phase) * np.sin(turn * across + ground.phase))
    elif ground.kind == "blobs":
        waves = np.sin(turn * along + ground.phase) + np.sin(turn * 0.8 * across + 2 * ground.phase)
        mix = 0.5 + 0.25 * (waves * np.cos(turn * 0.3 * (x - y))).astype(np.float32)
    else:
        raise ValueError(f"unknown ground {ground.kind!r}; one of {GROUNDS}")
    first, second = (torch.tensor(rgb).view(3, 1, 1) for rgb in (ground.first, ground.second))
    return torch.lerp(first, second, torch.from_numpy(mix.astype(np.float32)))


def coverage(sprite: Sprite, size: int) -> torch.Tensor:
    """Return the fraction of every pixel that the shape covers: (size, size) in [0, 1]."""
    x, y = _grid(size)
    x, y, r = x - sprite.centre[0], y - sprite.centre[1], sprite.radius
    if sprite.shape == "circle":
        distance = np.sqrt(x * x + y * y) - r
    elif sprite.shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.9 * r
    elif sprite.shape == "triangle":
        distance = np.maximum(y, 0.866 * np.abs(x) - 0.5 * y) - 0.65 * r
    else:
        raise ValueError(f"unknown shape {sprite.shape!r}; one of {SHAPES}")
    return torch.from_numpy(np.clip(0.5 - distance / (2 * EDGE), 0, 1).astype(np.float32))


def draw(ground: torch.Tensor, sprites: tuple[Sprite, ...]) -> torch.Tensor:
    """Draw the shapes over a drawn ground, the last on top: (3, H, W) in [-1, 1]."""
    picture = ground
    for sprite in sprites:
        cover = coverage(sprite, ground.shape[-1])
        picture = torch.lerp(picture, torch.tensor(sprite.rgb).view(3, 1, 1), cover)
    return picture * 2 - 1


def random_ground(rng: np.random.Generator, kind: str | None = None) -> Ground:
    """Draw a ground of greyish colours, so that none is the colour of a shape."""
    base = rng.uniform(0.22, 0.78) + rng.uniform(-0.07, 0.07, 3)
    # Low contrast, because the VAE stores each 8×8 pixels in four numbers.
    other = base + rng.choice([-1, 1]) * rng.uniform(0.06, 0.16) + rng.uniform(-0.03, 0.03, 3)
    return Ground(
        kind=kind or str(rng.choice(GROUNDS, p=(0.4, 0.2, 0.15, 0.1, 0.15))),
        first=_rgb(base),
        second=_rgb(other),
        angle=float(rng.uniform(0, np.pi)),
        period=float(rng.uniform(0.3, 0.6)),
        phase=float(rng.uniform(0, 2 * np.pi)),
    )


def random_sprite(rng: np.random.Generator, colour: str, shape: str, centre: Point, radius: float) -> Sprite:
    rgb = np.array(COLOURS[colour]) + rng.uniform(-0.05, 0.05, 3)
    return Sprite(shape=shape, colour=colour, rgb=_rgb(rgb), centre=centre, radius=radius)


def _grid(size: int) -> tuple[Plane, Plane]:
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    y, x = np.meshgrid(line, line, indexing="ij")
    return x, y


def _soft_step(wave: Plane) -> Plane:
    return (0.5 + 0.5 * np.tanh(2.5 * wave)).astype(np.float32)


def _rgb(values: NDArray[np.float64]) -> Rgb:
    r, g, b = np.clip(values, 0.02, 0.98)
    return float(r), float(g), float(b)
