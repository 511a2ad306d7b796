"""Random scenes: where the shapes stand, and where they may go without meeting.

A motion is a step (dx, dy) in fractions of the picture, gone evenly over the clip.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch

from training.demo_model.clips import (
    COLOURS,
    SHAPES,
    UNSEEN,
    Ground,
    Point,
    Rgb,
    Sprite,
    draw,
    draw_ground,
    random_ground,
    random_sprite,
)

DIRECTIONS: dict[str, Point] = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
STAY: Point = (0.0, 0.0)
ACTIONS = (*DIRECTIONS, "stays")
# In RGB, each in [0, 1]: further apart, two colours are not taken for each other.
FAR = 0.38


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """The first sprite is the one that a prompt names first; all stand where the clip begins."""

    ground: Ground
    sprites: tuple[Sprite, ...]

    def picture(self, size: int) -> torch.Tensor:
        return draw(draw_ground(self.ground, size), self.sprites)

    def clip(self, motions: tuple[Point, ...], frames: int, size: int) -> torch.Tensor:
        """Clip (frames, 3, size, size) in [-1, 1]; frame 0 is the picture."""
        ground = draw_ground(self.ground, size)
        ramp = [i / (frames - 1) for i in range(frames)]
        return torch.stack([draw(ground, self._at(motions, part)) for part in ramp])

    def _at(self, motions: tuple[Point, ...], part: float) -> tuple[Sprite, ...]:
        steps = zip(self.sprites, motions, strict=True)
        return tuple(sprite.moved(dx * part, dy * part) for sprite, (dx, dy) in steps)


def random_pair(rng: np.random.Generator, *, unseen: bool = False) -> tuple[str, str]:
    """Colour and shape, from those that training draws or from those it never does."""
    pairs = [(c, s) for c in COLOURS for s in SHAPES if ((c, s) in UNSEEN) == unseen]
    return pairs[int(rng.integers(len(pairs)))]


def still_scene(rng: np.random.Generator) -> Scene:
    """One to three shapes anywhere, cut by the edge or by each other: what the VAE must know."""
    sprites = []
    for _ in range(int(rng.integers(1, 4))):
        colour, shape = random_pair(rng)
        centre = (float(rng.uniform(0, 1)), float(rng.uniform(0, 1)))
        sprites.append(random_sprite(rng, colour, shape, centre, float(rng.uniform(0.08, 0.17))))
    return Scene(ground=random_ground(rng), sprites=tuple(sprites))


def one_shape(rng: np.random.Generator, travel: float, *, unseen: bool = False, inside: bool = False) -> Scene:
    """One shape that can go in all four directions; with inside, it stays wholly in the picture."""
    colour, shape = random_pair(rng, unseen=unseen)
    radius = float(rng.uniform(0.10, 0.15))
    margin = travel + (1.05 * radius if inside else 0.06)
    centre = (float(rng.uniform(margin, 1 - margin)), float(rng.uniform(margin, 1 - margin)))
    return Scene(ground=random_ground(rng), sprites=(random_sprite(rng, colour, shape, centre, radius),))


def two_shapes(
    rng: np.random.Generator, travel: float, *, unseen: bool = False, inside: bool = False
) -> tuple[Scene, Point]:
    """Two shapes that differ in colour, and the second's motion.

    The first can go in all four directions and never meets the second.
    """
    while True:
        first = one_shape(rng, travel, unseen=unseen, inside=inside)
        colour, shape = random_pair(rng)
        radius = float(rng.uniform(0.09, 0.13))
        low, high = 1.05 * radius, 1 - 1.05 * radius
        centre = (float(rng.uniform(low, high)), float(rng.uniform(low, high)))
        second = random_sprite(rng, colour, shape, centre, radius)
        motion = random_motion(rng, travel)
        if colour != first.sprites[0].colour and _clear(first.sprites[0], second, motion, travel):
            return Scene(ground=first.ground, sprites=(first.sprites[0], second)), motion


def random_motion(rng: np.random.Generator, travel: float) -> Point:
    """Stays in half of all draws, else one of the four directions."""
    if rng.random() < 0.5:
        return STAY
    dx, dy = list(DIRECTIONS.values())[int(rng.integers(4))]
    return dx * travel, dy * travel


def recoloured(rng: np.random.Generator, scene: Scene) -> Scene:
    """The shapes in any colours that are far from the ground's and from each other's.

    A colour that is near a named one keeps that name, any other has none (""). Nothing comes near to a combination that
    is kept for the benchmark.
    """
    ground = (scene.ground.first, scene.ground.second)
    while True:
        sprites = tuple(_any_colour(rng, sprite) for sprite in scene.sprites)
        names = [nearest_colour(sprite.rgb) for sprite in sprites]
        apart = all(_distance(sprite.rgb, rgb) > FAR for sprite in sprites for rgb in ground)
        kept = all(_distance(sprite.rgb, COLOURS[colour]) > FAR for sprite in sprites for colour in _kept(sprite.shape))
        if apart and kept and len(set(names)) == len(names):
            return replace(scene, sprites=sprites)


def nearest_colour(rgb: Rgb) -> str:
    return min(COLOURS, key=lambda colour: _distance(rgb, COLOURS[colour]))


def _any_colour(rng: np.random.Generator, sprite: Sprite) -> Sprite:
    r, g, b = (float(value) for value in rng.uniform(0.04, 0.96, 3))
    name = nearest_colour((r, g, b))
    named = _distance((r, g, b), COLOURS[name]) < FAR and name not in _kept(sprite.shape)
    return replace(sprite, rgb=(r, g, b), colour=name if named else "")


def _kept(shape: str) -> set[str]:
    """The colours in which training never draws a shape."""
    return {colour for colour, kept_shape in UNSEEN if kept_shape == shape}


def _distance(one: Rgb, other: Rgb) -> float:
    return float(np.hypot.reduce(np.subtract(one, other)))


def combinations(scene: Scene, travel: float) -> list[tuple[str, ...]]:
    """Every choice of one action for each shape that moves something and in which the shapes never meet."""
    choices = itertools.product(ACTIONS, repeat=len(scene.sprites))
    return [chosen for chosen in choices if set(chosen) != {"stays"} and _allowed(scene.sprites, chosen, travel)]


def motion_of(action: str, travel: float) -> Point:
    dx, dy = DIRECTIONS.get(action, STAY)
    return dx * travel, dy * travel


def action_of(motion: Point, travel: float) -> str:
    return next(action for action in ACTIONS if motion_of(action, travel) == motion)


def _allowed(sprites: tuple[Sprite, ...], actions: tuple[str, ...], travel: float) -> bool:
    if len(sprites) == 1:
        return True
    first, second = (motion_of(action, travel) for action in actions)
    return _inside(sprites[1], second) and _apart(sprites[0], first, sprites[1], second)


def _clear(first: Sprite, second: Sprite, motion: Point, travel: float) -> bool:
    """Whether the second stays in the picture and off the first, whichever way the first goes."""
    ways = [motion_of(action, travel) for action in DIRECTIONS]
    return _inside(second, motion) and all(_apart(first, way, second, motion) for way in ways)


def _inside(sprite: Sprite, motion: Point) -> bool:
    end = sprite.moved(*motion)
    return all(end.radius <= at <= 1 - end.radius for at in end.centre)


def _apart(first: Sprite, way: Point, second: Sprite, motion: Point) -> bool:
    room = 1.15 * (first.radius + second.radius)
    for part in np.linspace(0, 1, 6):
        here = np.array(first.moved(way[0] * part, way[1] * part).centre)
        there = np.array(second.moved(motion[0] * part, motion[1] * part).centre)
        if np.hypot(*(here - there)) < room:
            return False
    return True
