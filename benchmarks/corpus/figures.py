"""Numbers and picture sizes in a prompt, as far as its widgets tell them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .arithmetic import value_of

JSON = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures of one size, of which there are as many as `count`; None where a file decides."""

    width: int | None
    height: int | None
    count: int | None = 1


_UNKNOWN = Pictures(None, None, None)


class Figures:
    """Follows links of a prompt in the API's format to the values that come out of them."""

    def __init__(self, prompt: JSON) -> None:
        self.prompt = prompt

    def number(self, value: Any) -> float | None:
        """The number that an input gets, which is a widget's value or a link; None: a file decides, or it is none."""
        if not is_link(value):
            return value if isinstance(value, (int, float)) else None
        node = self.prompt[value[0]]
        found = _NUMBERS.get(node["class_type"])
        return None if found is None else found(self, node["inputs"], value[1])

    def whole(self, value: Any) -> int | None:
        """The number that an input of whole numbers gets."""
        number = self.number(value)
        return None if number is None else int(number)

    def pictures(self, value: Any) -> Pictures:
        """The pictures that come out of a link. A node that is not known keeps the size of those that it gets."""
        if not is_link(value):
            return _UNKNOWN
        node = self.prompt[value[0]]
        found = _PICTURES.get(node["class_type"])
        if found is not None:
            return found(self, node["inputs"])
        links = (it for it in node["inputs"].values() if is_link(it))
        return next((size for size in map(self.pictures, links) if size != _UNKNOWN), _UNKNOWN)


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _formula(figures: Figures, inputs: JSON, slot: int) -> float | None:
    names = {name.removeprefix("values."): figures.number(it) for name, it in inputs.items() if name != "expression"}
    known = {name: number for name, number in names.items() if number is not None}
    try:
        value = value_of(inputs["expression"], known)
    except ValueError:
        return None
    return int(value) if slot == 1 else value


def _chosen(figures: Figures, inputs: JSON, _slot: int) -> float | None:
    return figures.number(inputs.get("on_true" if figures.number(inputs["switch"]) else "on_false"))


def _picture_figure(figures: Figures, inputs: JSON, slot: int) -> float | None:
    size = figures.pictures(inputs["image"])
    return (size.width, size.height, size.count)[slot]


def _resolution(_figures: Figures, inputs: JSON, slot: int) -> float:
    """Sides of a picture of some megapixels, of which each is a multiple of a number."""
    wide, high = map(int, inputs["aspect_ratio"].split()[0].split(":"))
    multiple = inputs["multiple"]
    scale = math.sqrt(inputs["megapixels"] * 1024 * 1024 / (wide * high))
    return round((wide, high)[slot] * scale / multiple) * multiple


def _camera(figures: Figures, inputs: JSON, slot: int) -> float | None:
    return figures.number(inputs[("", "width", "height", "length")[slot]])


def _widget(figures: Figures, inputs: JSON, _slot: int) -> float | None:
    return figures.number(inputs.get("value"))


_NUMBERS: Mapping[str, Callable[[Figures, JSON, int], float | None]] = {
    "PrimitiveInt": _widget,
    "PrimitiveFloat": _widget,
    "PrimitiveBoolean": _widget,
    "ComfyMathExpression": _formula,
    "ComfySwitchNode": _chosen,
    "GetImageSize": _picture_figure,
    "ResolutionSelector": _resolution,
    "WanCameraEmbedding": _camera,
}
"""Figures of an output slot, by the type of the node."""


def _empty(figures: Figures, inputs: JSON) -> Pictures:
    width, height, count = (figures.whole(inputs[name]) for name in ("width", "height", "batch_size"))
    return Pictures(width, height, count)


def _scaled(figures: Figures, inputs: JSON) -> Pictures:
    width, height = (figures.whole(inputs[name]) for name in ("width", "height"))
    return replace(figures.pictures(inputs["image"]), width=width, height=height)


def _scaled_by(figures: Figures, inputs: JSON) -> Pictures:
    size, ratio = figures.pictures(inputs["image"]), figures.number(inputs["scale_by"])
    if size.width is None or size.height is None or ratio is None:
        return replace(size, width=None, height=None)
    return replace(size, width=round(size.width * ratio), height=round(size.height * ratio))


def _resized(figures: Figures, inputs: JSON) -> Pictures:
    width, height = (figures.whole(inputs.get(f"resize_type.{name}")) for name in ("width", "height"))
    return replace(figures.pictures(inputs["input"]), width=width, height=height)


def _cut(figures: Figures, inputs: JSON) -> Pictures:
    return replace(figures.pictures(inputs["image"]), count=figures.whole(inputs["length"]))


_PICTURES: Mapping[str, Callable[[Figures, JSON], Pictures]] = {
    "LoadImage": lambda _figures, _inputs: Pictures(None, None),
    "EmptyImage": _empty,
    "ImageScale": _scaled,
    "ImageScaleBy": _scaled_by,
    "ResizeImageMaskNode": _resized,
    "ImageFromBatch": _cut,
}
"""Sizes of the pictures that a type of node puts out."""
