"""A free place on the canvas for a new node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .level import JSON, Level

TITLE_PIXELS = 30
"""Height of a node's title, which lies above its position."""
_GAP_PIXELS = 30
_STEP_PIXELS = 30
_REACH_STEPS = 60


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle on the canvas, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        beside = self.right <= other.left or other.right <= self.left
        return not beside and self.top < other.bottom and other.top < self.bottom

    def contains(self, other: Box) -> bool:
        wide = self.left <= other.left and other.right <= self.right
        return wide and self.top <= other.top and other.bottom <= self.bottom

    def moved(self, right: float, down: float) -> Box:
        return Box(self.left + right, self.top + down, self.right + right, self.bottom + down)

    def grown(self, pixels: float) -> Box:
        return Box(self.left - pixels, self.top - pixels, self.right + pixels, self.bottom + pixels)


def node_box(node: JSON) -> Box:
    """The rectangle of a node with its title."""
    (left, top), (width, height) = _pair(node["pos"]), _pair(node["size"])
    return Box(left, top - TITLE_PIXELS, left + width, top + height)


def free_place(level: Level, size: tuple[float, float], beside: JSON) -> tuple[float, float]:
    """The position nearest to the right of a node at which a new one overlaps no other and no border of a group.

    Args:
        level: the graph that gets the new node.
        size: of the new node without its title.
        beside: one of its nodes.
    """
    taken = [node_box(node) for node in level.nodes.values()]
    ends = (level.graph[name] for name in ("inputNode", "outputNode") if name in level.graph)
    taken += [_bounding(end["bounding"]) for end in ends]
    taken = [box.grown(_GAP_PIXELS) for box in taken]
    groups = [_bounding(group["bounding"]) for group in level.graph.get("groups") or ()]
    left, top = node_box(beside).right + _GAP_PIXELS, node_box(beside).top
    wanted = Box(left, top, left + size[0], top + size[1] + TITLE_PIXELS)

    def free(box: Box) -> bool:
        clear = not any(box.overlaps(other) for other in taken)
        return clear and all(group.contains(box) or not group.overlaps(box) for group in groups)

    reach = range(-_REACH_STEPS, _REACH_STEPS + 1)
    steps = sorted(((x, y) for x in reach for y in reach), key=lambda it: it[0] ** 2 + it[1] ** 2)
    places = (wanted.moved(x * _STEP_PIXELS, y * _STEP_PIXELS) for x, y in steps)
    lowest = max(box.bottom for box in (*taken, *groups))
    found = next(filter(free, places), wanted.moved(0, lowest - wanted.top))
    return found.left, found.top + TITLE_PIXELS


def _bounding(values: Sequence[float]) -> Box:
    left, top, width, height = values
    return Box(left, top, left + width, top + height)


def _pair(value: Any) -> tuple[float, float]:
    """A position or size, which older pages write as an object."""
    first, second = (value["0"], value["1"]) if isinstance(value, dict) else value[:2]
    return first, second
