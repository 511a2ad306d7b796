"""When nothing fits: the nearest requests, and the least budget, that would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DoesNotFitError
from ..families import VideoSize, family_of
from ..units import GIB, format_gib
from .plan import StagePrediction
from .request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestions:
    """What would fit: the same video shorter, or smaller (None: not even the least of it), or with more budget, or with
    so much free host memory (None: more of that would not help), or approximately, such as with `fp8 weights` (None:
    that is allowed already, or would not help).
    """

    shorter: VideoSize | None
    smaller: VideoSize | None
    budget_bytes: int
    host_bytes: int | None = None
    approximation: str | None = None

    def __str__(self) -> str:
        ways = [f"{self.shorter.frames} frames"] if self.shorter else []
        ways += [f"{self.smaller.width_pixels}×{self.smaller.height_pixels}"] if self.smaller else []
        # Rounded up, so that what is read here and typed in does fit.
        ways.append(f"a budget of {-(-self.budget_bytes * 100 // GIB) / 100:.2f} GiB")
        if self.host_bytes is not None:
            ways.append(f"{format_gib(self.host_bytes)} of free host memory")
        if self.approximation is not None:
            ways.append(f"allow approximate plans ({self.approximation})")
        return "use " + ", or ".join(ways)

    def as_dict(self) -> dict[str, Any]:
        return {
            "frames": self.shorter.frames if self.shorter else None,
            "width": self.smaller.width_pixels if self.smaller else None,
            "height": self.smaller.height_pixels if self.smaller else None,
            "budget_bytes": self.budget_bytes,
            "host_bytes": self.host_bytes,
            "approximation": self.approximation,
        }


class NothingFitsError(DoesNotFitError):
    """Refusal of a request: `least` is the binding stage of its thriftiest plan, `nearest` what would fit."""

    def __init__(self, problem: str, least: StagePrediction, nearest: Suggestions) -> None:
        super().__init__(problem, str(nearest))
        self.least = least
        self.suggestions = nearest


def suggestions(
    request: Request,
    *,
    budget_bytes: int,
    host_bytes: int | None,
    approximation: str | None,
    fits: Callable[[Request], bool],
) -> Suggestions:
    """`fits` must be monotonic in frames and in size; the others are what the request needs, as in `Nearest`."""

    def largest(sizes: list[VideoSize]) -> VideoSize | None:
        return _last_that(sizes, lambda size: fits(replace(request, size=size)))

    return Suggestions(
        shorter=largest(_shorter(request)),
        smaller=largest(_smaller(request)),
        budget_bytes=budget_bytes,
        host_bytes=host_bytes,
        approximation=approximation,
    )


def _shorter(request: Request) -> list[VideoSize]:
    step = family_of(request.architecture).facts.temporal_compression
    return [replace(request.size, frames=frames) for frames in range(1, request.size.frames, step)]


def _smaller(request: Request) -> list[VideoSize]:
    """Sizes below the request's, from small to large, as near to its shape as the family's multiple allows."""
    facts, size = family_of(request.architecture).facts, request.size
    multiple, least = facts.size_multiple, facts.min_side_pixels
    short, long = sorted((size.width_pixels, size.height_pixels))
    sizes: list[VideoSize] = []
    for short_pixels in range(-(-least // multiple) * multiple, short, multiple):
        long_pixels = max(least, round(long * short_pixels / short / multiple) * multiple)
        wide = size.width_pixels >= size.height_pixels
        width, height = (long_pixels, short_pixels) if wide else (short_pixels, long_pixels)
        sizes.append(replace(size, width_pixels=width, height_pixels=height))
    return sizes


def _last_that(sizes: list[VideoSize], fits: Callable[[VideoSize], bool]) -> VideoSize | None:
    """The last of a list that fits, by bisection: all before it fit, all after it do not."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else None
