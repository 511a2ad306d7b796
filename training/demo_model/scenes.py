"""Scenes, mostly random: positions of the shapes, and motions in which they do not meet.

A motion is a displacement (dx, dy) in fractions of the picture, spread evenly over the clip.
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
# Distance in RGB, each in [0, 1], from which on two colours are not mistaken for each other.
FAR = 0.38


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A ground and the shapes on it at the start of the clip; prompts name the first sprite first."""

    ground: Ground
    sprites: tuple[Sprite, ...]

    def picture(self, size: int) -> torch.Tensor:
        return draw(draw_ground(self.ground, size), self.sprites)

    def clip(self, motions: tuple[Point, ...], frames: int, size: int) -> torch.Tensor:
        """Draw a clip (frames, 3, size, size) in [-1, 1]; frame 0 is the picture."""
        ground = draw_ground(self.ground, size)
        ramp = [i / (frames - 1) for i in range(frames)]
        return torch.stack([draw(ground, self._at(motions, part)) for part in ramp])

    def _at(self, motions: tuple[Point, ...], part: float) -> tuple[Sprite, ...]:
        steps = zip(self.sprites, motions, strict=True)
        return tuple(sprite.moved(dx * part, dy * part) for sprite, (dx, dy) in steps)


def example_scene() -> Scene:
    """Return the scene of the example picture: a red circle, and a blue square out of its way."""
    ground = Ground(
        kind="gradient",
        first=(0.66, 0.64, 0.58),
        second=(0.52, 0.54, 0.56),
        angle=float(np.pi / 3),
        period=0.5,
        phase=0.0,
    )
    circle = Sprite(shape="circle", colour="red", rgb=COLOURS["red"], centre=(0.52, 0.44), radius=0.13)
    square = Sprite(shape="square", colour="blue", rgb=COLOURS["blue"], centre=(0.2, 0.84), radius=0.11)
    return Scene(ground=ground, sprites=(circle, square))


def random_pair(rng: np.random.Generator, *, unseen: bool = False) -> tuple[str, str]:
    """Draw a colour and a shape, from those that training uses or from those it never does."""
    pairs = [(c, s) for c in COLOURS for s in SHAPES if ((c, s) in UNSEEN) == unseen]
    return pairs[int(rng.integers(len(pairs)))]


def still_scene(rng: np.random.Generator) -> Scene:
    """Draw one to three shapes anywhere, cut by the edge or by each other, to train the VAE on."""
    sprites = []
    for _ in range(int(rng.integers(1, 4))):
        colour, shape = random_pair(rng)
        centre = (float(rng.uniform(0, 1)), float(rng.uniform(0, 1)))
        sprites.append(random_sprite(rng, colour, shape, centre, float(rng.uniform(0.08, 0.17))))
    return Scene(ground=random_ground(rng), sprites=tuple(sprites))


def one_shape(rng: np.random.Generator, travel: float, *, unseen: bool = False, inside: bool = False) -> Scene:
    """Draw one shape that can move in all four directions; with `inside` it stays wholly in the picture."""
    colour, shape = random_pair(rng, unseen=unseen)
    radius = float(rng.uniform(0.10, 0.15))
    margin = travel + (1.05 * radius if inside else 0.06)
    centre = (float(rng.uniform(margin, 1 - margin)), float(rng.uniform(margin, 1 - margin)))
    return Scene(ground=random_ground(rng), sprites=(random_sprite(rng, colour, shape, centre, radius),))


def two_shapes(
    rng: np.random.Generator, travel: float, *, unseen: bool = False, inside: bool = False
) -> tuple[Scene, Point]:
    """Draw two shapes that differ in colour, and the second's motion.

    The first can move in all four directions and never meets the second.
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
    """Draw a motion: none in half of all draws, else one of the four directions."""
    if rng.random() < 0.5:
        return STAY
    dx, dy = list(DIRECTIONS.values())[int(rng.integers(4))]
    return dx * travel, dy * travel


def recoloured(rng: np.random.Generator, scene: Scene) -> Scene:
    """Redraw the shapes in colours that are far from the ground's and from each other's.

    A colour near a named one gets that name, any other none (""). No combination comes near one that is reserved for
    the benchmark.
    """
    ground = (scene.ground.first, scene.ground.second)
    while True:
        sprites = tuple(_any_colour(rng, sprite) for sprite in scene.sprites)
        names = [nearest_colour(sprite.rgb) for sprite in sprites]
        apart = all(_distance(sprite.rgb, rgb) > FAR for sprite in sprites for rgb in ground)
        allowed = all(
            _distance(sprite.rgb, COLOURS[colour]) > FAR for sprite in sprites for colour in _reserved(sprite.shape)
        )
        if apart and allowed and len(set(names)) == len(names):
            return replace(scene, sprites=sprites)


def nearest_colour(rgb: Rgb) -> str:
    return min(COLOURS, key=lambda colour: _distance(rgb, COLOURS[colour]))


def _any_colour(rng: np.random.Generator, sprite: Sprite) -> Sprite:
    r, g, b = (float(value) for value in rng.uniform(0.04, 0.96, 3))
    name = nearest_colour((r, g, b))
    named = _distance((r, g, b), COLOURS[name]) < FAR and name not in _reserved(sprite.shape)
    return replace(sprite, rgb=(r, g, b), colour=name if named else "")


def _reserved(shape: str) -> set[str]:
    """Return the colours in which training never draws a shape."""
    return {colour for colour, reserved_shape in UNSEEN if reserved_shape == shape}


def _distance(one: Rgb, other: Rgb) -> float:
    return float(np.hypot.reduce(np.subtract(one, other)))


def combinations(scene: Scene, travel: float) -> list[tuple[str, ...]]:
    """List every choice of one action per shape that moves some shape and in which the shapes never meet."""
    choices = itertools.product(ACTIONS, repeat=len(scene.sprites))
    return [actions for actions in choices if set(actions) != {"stays"} and _allowed(scene.sprites, actions, travel)]


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
    """Return whether the second stays in the picture and off the first, whichever direction the first takes."""
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
