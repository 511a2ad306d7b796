"""Settings of running an autoencoder: frames at a time, and tiles."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TilingSettings:
    """Frames at a time, size of tiles, and where feature maps are kept."""

    chunk_size: int
    """Frames that run at a time."""

    tile_pixels: int = 0
    """Side of a square with a tile's area at full resolution; a tile itself is as wide as the frame. 0: no tiles, and
    the model's own forward runs."""

    maps_bytes: int | None = None
    """Bytes of feature maps that stay on the device between tiled layers; further maps are offloaded to host memory.
    None: all stay."""

    @property
    def by_layer(self) -> bool:
        """Whether layers run one after another in tiles, rather than the model's own forward."""
        return self.tile_pixels > 0

    def __post_init__(self) -> None:
        assert self.chunk_size >= 1
        assert self.tile_pixels >= 0
        assert self.maps_bytes is None or (self.tile_pixels and self.maps_bytes >= 0)


ONE_FRAME_UNTILED = TilingSettings(chunk_size=1)
