"""The ways in which the encoders and the decoder could run, and the fastest of them that fits.

Each list goes from fast to thrifty: whole frames, as many at once as can be; then tiles, of as few frames as the
decoder can take by themselves, smaller and smaller; then with what the layers pass on waiting in host memory. The
weights stay in place as long as that does, since they are small here. All ways have the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Generic, TypeVar

import torch

from ..decoding import ONE_FRAME_UNTILED, TilingSettings
from ..families import family_of
from ..units import GIB, MIB
from .plan import DecodeSettings, EncodeSettings, StagePrediction
from .predict import predict_decode, predict_encode
from .request import Request

Settings = TypeVar("Settings")
Prediction = TypeVar("Prediction", bound=StagePrediction)

# So many pixels at once keep any GPU busy; more would take memory and save no time. (An estimate, made without a GPU.)
_PIXELS_OF_USE = 2**20
_TILES_PIXELS = (2048, 1024, 512, 256, 128, 64, 32)
# Where maps are parked, the tile is small beside them.
_PARKED_TILE_PIXELS = 128
_MAPS_BYTES = (2 * GIB, GIB, 512 * MIB, 256 * MIB, 128 * MIB, 64 * MIB, 16 * MIB, 4 * MIB, 0)


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
    def predict(way: EncodeSettings) -> StagePrediction:
        return predict_encode(request, way, dtype)

    # Where the encoders of text and of what is in the picture do not fit, tiles do not help.
    ways = [it for it in encode_candidates(request) if fits(predict_encode(request, it[0], dtype, of_any_size=True))]
    # The picture whole fits nearly always.
    return _first_of_all([it[0] for it in ways[:1]], predict, fits) or _fastest(ways, predict, fits)


def cheapest_decode(
    request: Request, dtype: torch.dtype, fits: Fits
) -> Candidate[DecodeSettings, StagePrediction] | None:
    return _fastest(decode_candidates(request), lambda it: predict_decode(request, it, dtype), fits)


def encode_candidates(request: Request) -> tuple[Sequence[EncodeSettings], ...]:
    whole, tiles = [ONE_FRAME_UNTILED], _tiles(request, 1)
    return (
        [EncodeSettings(picture=it) for it in (*whole, *tiles)],
        [EncodeSettings(picture=it, streamed=True) for it in (*whole, *tiles, *_offloaded(tiles))],
    )


def decode_candidates(request: Request) -> tuple[Sequence[DecodeSettings], ...]:
    sizes = _decode_chunk_sizes(request)
    whole, tiles = [TilingSettings(chunk_size=it) for it in sizes], _tiles(request, sizes[-1])
    return (
        [DecodeSettings(frames=it) for it in (*whole, *tiles)],
        [DecodeSettings(frames=it, streamed=True) for it in (*(tiles or whole), *_offloaded(tiles))],
    )


def decode_in_tiles(request: Request, tile_pixels: int) -> TilingSettings:
    """Such tiles of as few frames at once as can be."""
    return TilingSettings(chunk_size=_decode_chunk_sizes(request)[-1], tile_pixels=tile_pixels)


def _decode_chunk_sizes(request: Request) -> Sequence[int]:
    max_useful = _PIXELS_OF_USE // (request.size.width_pixels * request.size.height_pixels)
    return family_of(request.architecture).decode_chunk_sizes(request.size, max_useful)


def with_maps_offloaded(pieces: TilingSettings) -> list[TilingSettings]:
    """The same tiles, with ever less of what the layers pass on left on the device."""
    return [
        TilingSettings(chunk_size=pieces.chunk_size, tile_pixels=pieces.tile_pixels, maps_bytes=maps_bytes)
        for maps_bytes in _MAPS_BYTES
    ]


def _tiles(request: Request, frames: int) -> list[TilingSettings]:
    """So many frames in tiles, from one that holds a frame whole on; none where the autoencoder cannot be cut."""
    if not family_of(request.architecture).supports_tiling(request.architecture):
        return []
    side_pixels = prod((request.size.width_pixels, request.size.height_pixels)) ** 0.5
    return [TilingSettings(chunk_size=frames, tile_pixels=it) for it in _TILES_PIXELS if it < 2 * side_pixels]


def _offloaded(tiles: Sequence[TilingSettings]) -> list[TilingSettings]:
    small = [it for it in tiles if it.tile_pixels <= _PARKED_TILE_PIXELS]
    return [*with_maps_offloaded(small[0]), *(with_maps_offloaded(it)[-1] for it in small[1:])] if small else []


def _fastest(
    ways: Sequence[Sequence[Settings]], predict: Callable[[Settings], StagePrediction], fits: Fits
) -> Candidate[Settings, StagePrediction] | None:
    for group in ways:
        if not fits(replace(predict(group[-1]), host_bytes=0)):
            continue  # the last takes least of the device
        # What takes less of the device may take more of the host: all are tried before it is said that none fits.
        found = first_that_fits(group, predict, fits) or _first_of_all(group, predict, fits)
        if found is not None:
            return found
    return None


def _first_of_all(
    ways: Sequence[Settings], predict: Callable[[Settings], StagePrediction], fits: Fits
) -> Candidate[Settings, StagePrediction] | None:
    candidates = (Candidate(way, predict(way)) for way in ways)
    return next((it for it in candidates if fits(it.prediction)), None)


def first_that_fits(
    ways: Sequence[Settings], predict: Callable[[Settings], Prediction], fits: Fits
) -> Candidate[Settings, Prediction] | None:
    """Bisects ways of which each takes less than those before it."""
    found: Candidate[Settings, Prediction] | None = None
    low, high = 0, len(ways)
    while low < high:
        middle = (low + high) // 2
        prediction = predict(ways[middle])
        if fits(prediction):
            found, high = Candidate(ways[middle], prediction), middle
        else:
            low = middle + 1
    return found
