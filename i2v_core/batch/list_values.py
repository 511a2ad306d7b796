"""One value of a row, from CSV's text or JSON's types, or a `BadInputError` that names it."""

from __future__ import annotations

import math
import re

from ..errors import BadInputError
from ..families import VideoSize
from .list_rows import Value

_WHOLE = re.compile(r"[+-]?[0-9]{1,20}")
_SIZE = re.compile(r"\s*([0-9]{1,6})\s*[x×*]\s*([0-9]{1,6})(?:\s*[x×*]\s*([0-9]{1,6}))?\s*", re.IGNORECASE)
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def text(name: str, value: Value) -> str:
    if not isinstance(value, str):
        raise BadInputError(f"the {name} is {value}, which is no text", "write it in quotation marks")
    return value


def whole_number(name: str, value: Value) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        return int(value)
    raise BadInputError(f"the {name} is '{value}', which is no whole number", "write for example 16")


def number(name: str, value: Value) -> float:
    """A finite number."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise BadInputError(f"the {name} is '{value}', which is no finite number", "write for example 7.5")
    return found


def flag(name: str, value: Value) -> bool:
    found = _FLAGS.get(str(value).strip().lower())
    if found is None:
        raise BadInputError(f"the {name} is '{value}'", "write true or false")
    return found


def size(value: Value, default_frames: int) -> VideoSize:
    """Of `512x320` or `512x320x16`."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise BadInputError(f"the size is '{value}', which is none", "write width x height, such as 512x320")
    width, height, frames = match.groups()
    return VideoSize(
        width_pixels=int(width), height_pixels=int(height), frames=default_frames if frames is None else int(frames)
    )
