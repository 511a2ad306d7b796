"""Suggestions where nothing fits: the largest requests, and the smallest budget, that would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DoesNotFitError
from ..families import VideoSize, family_of
from ..memory.device import DeviceFacts
from ..units import GIB, format_gib
from .fit_limit import FitLimit
from .plan import StagePrediction
from .request import Request
from .search import fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestions:
    """Changes, each of which alone makes the request fit."""

    shorter: VideoSize | None
    """The same video with fewer frames; None where not even one frame fits."""

    smaller: VideoSize | None
    """The same video at a smaller size; None where not even the smallest fits."""

    budget_bytes: int

    host_bytes: int | None = None
    """Free host memory; None where more of it would not help."""

    approximation: str | None = None
    """Such as `fp8 weights`; None where that is allowed already, or would not help."""

    def __str__(self) -> str:
        changes = [f"{self.shorter.frames} frames"] if self.shorter else []
        changes += [f"{self.smaller.width_pixels}×{self.smaller.height_pixels}"] if self.smaller else []
        # Rounded up, so that the number fits when the user types it in.
        changes.append(f"a budget of {-(-self.budget_bytes * 100 // GIB) / 100:.2f} GiB")
        if self.host_bytes is not None:
            changes.append(f"{format_gib(self.host_bytes)} of free host memory")
        if self.approximation is not None:
            changes.append(f"allow approximate plans ({self.approximation})")
        return "use " + ", or ".join(changes)

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
    """Refusal of a request. `least` is the highest stage of its lowest-memory settings."""

    def __init__(self, problem: str, least: StagePrediction, suggested: Suggestions) -> None:
        super().__init__(problem, str(suggested))
        self.least = least
        self.suggestions = suggested


def suggestions(
    request: Request,
    device: DeviceFacts,
    limit: FitLimit,
    *,
    budget_bytes: int,
    host_bytes: int | None = None,
    approximation: str | None = None,
) -> Suggestions:
    """Searches for the longest and the largest video that fit the limit; the other changes are the caller's."""

    def largest(sizes: list[VideoSize]) -> VideoSize | None:
        return _last_that_fits(sizes, lambda size: fits(replace(request, size=size), device, limit))

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


def _last_that_fits(sizes: list[VideoSize], fits_at: Callable[[VideoSize], bool]) -> VideoSize | None:
    """The last of the sizes that fits, by bisection: all before it fit, and none after it does."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits_at(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else None
