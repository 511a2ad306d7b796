"""Sizes in bytes: parsing and formatting."""

from __future__ import annotations

import math
import re

from .errors import BadInputError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# A decimal "GB" on a graphics card's box means binary gibibytes, so GB and GiB are read alike.
_UNIT_BYTES = {"": GIB, "b": 1, "k": KIB, "m": MIB, "g": GIB}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([bkmg]?)(?:i?b)?\s*", re.IGNORECASE)
# The pattern's time grows with the square of a text's length.
_LONGEST_CHARACTERS = 64


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as "6", "6GiB", "6 GB" or "6144MiB"; a number without unit is in GiB.

    Raises:
        BadInputError: the text is not a size, or the size is not above zero.
    """
    match = _SIZE.fullmatch(text) if len(text) <= _LONGEST_CHARACTERS else None
    if match is None:
        raise BadInputError(f"'{text}' is not an amount of memory", "write for example 6, 6GiB or 6144MiB")
    size = float(match[1]) * _UNIT_BYTES[match[2].lower()]
    if size < 1 or not math.isfinite(size):
        raise BadInputError(f"an amount of memory of '{text}' is not possible", "give a size above zero, such as 6GiB")
    return int(size)


def format_gib(size_bytes: float) -> str:
    """Return a size such as `3.02 GiB`; below 0.1 GiB in MiB, so that small models do not show as 0."""
    if size_bytes < 0.1 * GIB:
        return f"{size_bytes / MIB:.1f} MiB"
    return f"{size_bytes / GIB:.2f} GiB"
