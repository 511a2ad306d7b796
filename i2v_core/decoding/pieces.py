"""What a plan decides about running an autoencoder in pieces."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TilingSettings:
    """How finely frames are cut.

    chunk_size: frames at once.
    tile_pixels: 0 where the model's own forward runs on whole frames; else layers run one after another, each in tiles
        of at most this many pixels squared (at full resolution; a tile is a band as wide as the frame).
    maps_bytes: with tiles, what the layers pass on stays on the device up to this many bytes, and beyond that it waits
        in host memory; None: all of it stays.
    """

    chunk_size: int
    tile_pixels: int = 0
    maps_bytes: int | None = None

    @property
    def by_layer(self) -> bool:
        """Whether layers run one after another, rather than the model's own forward."""
        return self.tile_pixels > 0

    def __post_init__(self) -> None:
        assert self.chunk_size >= 1
        assert self.tile_pixels >= 0
        assert self.maps_bytes is None or (self.tile_pixels and self.maps_bytes >= 0)


ONE_WHOLE_FRAME = TilingSettings(chunk_size=1)
