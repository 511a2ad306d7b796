"""The settings that each stage could run with.

Lists go from fast to low memory. Encode and decode: unchunked frames, as many at once as are of use; then tiles, of as
few frames as the decoder accepts, smaller and smaller; then the same with feature maps offloaded to host memory. The
weights stay on the device as long as that fits, since these models are small. All of that has the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import prod

import torch

from ..decoding import ONE_FRAME_UNTILED, TilingSettings
from ..families import family_of
from ..units import GIB, MIB
from .approximations import Approximation
from .plan import DecodeSettings, EncodeSettings, SampleSettings
from .request import Request

# This many pixels at once keep any GPU busy; more would need memory and save no time. (An estimate, made without a
# GPU.)
_USEFUL_PIXELS = 2**20
_TILES_PIXELS = (2048, 1024, 512, 256, 128, 64, 32)
# Where feature maps are offloaded, the tile is small beside them.
_OFFLOADED_TILE_PIXELS = 128
_MAPS_BYTES = (2 * GIB, GIB, 512 * MIB, 256 * MIB, 128 * MIB, 64 * MIB, 16 * MIB, 4 * MIB, 0)
_WORKSPACES_BYTES = (None, 4 * GIB, 2 * GIB, GIB, 512 * MIB, 256 * MIB, 128 * MIB, 64 * MIB, 16 * MIB, 4 * MIB, MIB)


def encode_candidates(request: Request) -> tuple[Sequence[EncodeSettings], ...]:
    """Groups: weights on the device, and streamed."""
    unchunked, tiles = [ONE_FRAME_UNTILED], _tiles(request, 1)
    return (
        [EncodeSettings(tiling=it) for it in (*unchunked, *tiles)],
        [EncodeSettings(tiling=it, streamed=True) for it in (*unchunked, *tiles, *_offloaded(tiles))],
    )


def decode_candidates(request: Request) -> tuple[Sequence[DecodeSettings], ...]:
    """Groups: weights on the device, and streamed."""
    sizes = _decode_chunk_sizes(request)
    untiled, tiles = [TilingSettings(chunk_size=it) for it in sizes], _tiles(request, sizes[-1])
    return (
        [DecodeSettings(tiling=it) for it in (*untiled, *tiles)],
        [DecodeSettings(tiling=it, streamed=True) for it in (*(tiles or untiled), *_offloaded(tiles))],
    )


def sample_candidates(request: Request, dtype: torch.dtype, approximation: Approximation) -> list[SampleSettings]:
    """All combinations of offloaded skips, streamed weights and guidance, each still unchunked."""
    batched = (True, False) if request.guidance else (True,)
    return [
        approximation.applied_to(
            SampleSettings(
                compute_dtype=dtype, batched_guidance=is_batched, streamed=is_streamed, offload_skips=offload_skips
            )
        )
        for offload_skips, is_streamed, is_batched in product(_offload_choices(request), (False, True), batched)
    ]


def chunked_candidates(settings: SampleSettings) -> list[SampleSettings]:
    """The same settings with ever smaller workspaces: the peak falls, and layers are called more often."""
    return [replace(settings, workspace_bytes=it) for it in _WORKSPACES_BYTES]


def smallest_sample_candidates(
    request: Request, dtype: torch.dtype, approximation: Approximation
) -> list[SampleSettings]:
    """Candidates with the smallest activations: one needs the least device memory of all, one the least host memory."""
    smallest = SampleSettings(compute_dtype=dtype, batched_guidance=False, workspace_bytes=_WORKSPACES_BYTES[-1])
    return [
        approximation.applied_to(replace(smallest, streamed=streamed, offload_skips=offload_skips))
        for streamed, offload_skips in product((True, False), _offload_choices(request)[::-1])
    ]


def tiled_decode_candidates(settings: DecodeSettings, request: Request, tile_pixels: int) -> list[DecodeSettings]:
    """The decode settings with such tiles, and ever fewer bytes of feature maps left on the device."""
    tiling = decode_tiling(request, tile_pixels)
    return [replace(settings, tiling=it) for it in (tiling, *_with_maps_offloaded(tiling))]


def decode_tiling(request: Request, tile_pixels: int) -> TilingSettings:
    """Tiles of this side, of as few frames at once as the decoder accepts."""
    return TilingSettings(chunk_size=_decode_chunk_sizes(request)[-1], tile_pixels=tile_pixels)


def _decode_chunk_sizes(request: Request) -> Sequence[int]:
    of_use = _USEFUL_PIXELS // (request.size.width_pixels * request.size.height_pixels)
    return family_of(request.architecture).decode_chunk_sizes(request.size, of_use)


def _tiles(request: Request, frames: int) -> list[TilingSettings]:
    """Tiles of this many frames, beginning with one that holds a frame; none where the autoencoder cannot be tiled."""
    if not family_of(request.architecture).supports_tiling(request.architecture):
        return []
    side_pixels = prod((request.size.width_pixels, request.size.height_pixels)) ** 0.5
    return [TilingSettings(chunk_size=frames, tile_pixels=it) for it in _TILES_PIXELS if it < 2 * side_pixels]


def _offloaded(tiles: Sequence[TilingSettings]) -> list[TilingSettings]:
    small = [it for it in tiles if it.tile_pixels <= _OFFLOADED_TILE_PIXELS]
    return [*_with_maps_offloaded(small[0]), *(_with_maps_offloaded(it)[-1] for it in small[1:])] if small else []


def _with_maps_offloaded(tiling: TilingSettings) -> list[TilingSettings]:
    """The same tiles, with ever fewer bytes of feature maps left on the device."""
    return [replace(tiling, maps_bytes=maps_bytes) for maps_bytes in _MAPS_BYTES]


def _offload_choices(request: Request) -> tuple[bool, ...]:
    """Whether skip connections may be offloaded, the faster choice first."""
    return (False, True) if family_of(request.architecture).facts.has_skips else (False,)
