"""The ways in which each stage could run, and the cheapest of them that fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Generic, TypeVar

import torch

from ..families import WHOLE_FRAMES, DecodeTile
from ..units import GIB, MIB
from .cost import decode_cost, least_sample_cost, sample_cost
from .plan import DecodeSettings, EncodeSettings, SamplePrediction, SampleSettings, StagePrediction
from .predict import predict_decode, predict_encode, predict_sample
from .request import Request

Settings = TypeVar("Settings")
Prediction = TypeVar("Prediction", bound=StagePrediction)

_WORKSPACES_BYTES = (None, 4 * GIB, 2 * GIB, GIB, 512 * MIB, 256 * MIB, 128 * MIB, 64 * MIB, 16 * MIB, 4 * MIB, MIB)
_TILES_PIXELS = (512, 256, 128)

TILE_OVERLAP = 0.25
"""Overlap of the decoder's tiles, as a share of a tile."""


@dataclass(frozen=True, slots=True)
class Candidate(Generic[Settings, Prediction]):
    """One way to run a stage, with what it takes."""

    settings: Settings
    prediction: Prediction


# Whether a prediction is within the budget.
Fits = Callable[[StagePrediction], bool]


def cheapest_encode(
    request: Request, dtype: torch.dtype, fits: Fits
) -> Candidate[EncodeSettings, StagePrediction] | None:
    return _first_fit(
        (EncodeSettings(streamed=streamed) for streamed in (False, True)),
        lambda settings: predict_encode(request, settings, dtype),
        fits,
    )


def cheapest_decode(
    request: Request, dtype: torch.dtype, fits: Fits
) -> Candidate[DecodeSettings, StagePrediction] | None:
    return _first_fit(
        sorted(_decode_ways(request), key=lambda it: decode_cost(request, it)),
        lambda it: predict_decode(request, it, dtype),
        fits,
    )


def _decode_ways(request: Request) -> list[DecodeSettings]:
    """Whole frames, and tiles of one frame; tiles change the result a little, so they cost more than any exact way."""
    longest_pixels = max(request.size.width_pixels, request.size.height_pixels)
    tiles = [pixels for pixels in _TILES_PIXELS if pixels < longest_pixels]
    ways = [(chunk_size, WHOLE_FRAMES) for chunk_size in chunk_sizes(request)]
    ways += [(1, DecodeTile(size_pixels=pixels, overlap_pixels=int(pixels * TILE_OVERLAP))) for pixels in tiles]
    return [
        DecodeSettings(chunk_size=chunk_size, tile=tile, streamed=streamed)
        for (chunk_size, tile), streamed in product(ways, (False, True))
    ]


def cheapest_sample(
    request: Request, dtype: torch.dtype, fits: Fits
) -> Candidate[SampleSettings, SamplePrediction] | None:
    """Searches workspaces within each way to place weights, skips and guidance, the ways from cheap to dear."""
    best: Candidate[SampleSettings, SamplePrediction] | None = None
    best_cost = math.inf
    for way in sorted(_sample_ways(request, dtype), key=lambda it: least_sample_cost(request, it)):
        if least_sample_cost(request, way) >= best_cost:
            break
        found = _largest_workspace(request, way, fits)
        if found is not None and (cost := sample_cost(request, found.settings, found.prediction)) < best_cost:
            best, best_cost = found, cost
    return best


def thriftiest(request: Request, dtype: torch.dtype, host_free_bytes: int | None) -> tuple[StagePrediction, ...]:
    """The stages when each runs in the way that takes least of the device, whatever its time.

    Ways that host memory does not allow are left out; where it allows none, those that take least of it are taken.
    """
    smallest = SampleSettings(compute_dtype=dtype, batched_guidance=False, workspace_bytes=_WORKSPACES_BYTES[-1])
    by_stage: tuple[list[StagePrediction], ...] = (
        [predict_encode(request, EncodeSettings(streamed=streamed), dtype) for streamed in (True, False)],
        [
            predict_sample(request, replace(smallest, streamed=streamed, park_skips=parked))
            for streamed, parked in product((True, False), (True, False))
        ],
        [predict_decode(request, way, dtype) for way in reversed(_decode_ways(request)[-2:])],
    )
    stages: list[StagePrediction] = []
    for ways in by_stage:
        allowed = [way for way in ways if host_free_bytes is None or way.host_bytes <= host_free_bytes]
        least_host = min(ways, key=lambda it: it.host_bytes)
        stages.append(min(allowed, key=lambda it: it.peak_bytes, default=least_host))
    return tuple(stages)


def chunk_sizes(request: Request) -> list[int]:
    """Numbers of frames to decode at once, from all to one, halving."""
    sizes = [request.size.frames]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def _sample_ways(request: Request, dtype: torch.dtype) -> Iterator[SampleSettings]:
    batched = (True, False) if request.guidance else (True,)
    for parked, streamed, together in product((False, True), (False, True), batched):
        yield SampleSettings(compute_dtype=dtype, batched_guidance=together, streamed=streamed, park_skips=parked)


def _largest_workspace(
    request: Request, way: SampleSettings, fits: Fits
) -> Candidate[SampleSettings, SamplePrediction] | None:
    """Bisects the workspaces: the smaller, the lower the peak and the more pieces."""
    found: Candidate[SampleSettings, SamplePrediction] | None = None
    low, high = 0, len(_WORKSPACES_BYTES)
    while low < high:
        middle = (low + high) // 2
        settings = replace(way, workspace_bytes=_WORKSPACES_BYTES[middle])
        prediction = predict_sample(request, settings)
        if fits(prediction):
            found, high = Candidate(settings, prediction), middle
        else:
            low = middle + 1
    return found


def _first_fit(
    settings: Iterable[Settings], predict: Callable[[Settings], Prediction], fits: Fits
) -> Candidate[Settings, Prediction] | None:
    for it in settings:
        prediction = predict(it)
        if fits(prediction):
            return Candidate(it, prediction)
    return None
