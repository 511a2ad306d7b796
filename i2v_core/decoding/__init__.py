"""Tiled execution of an autoencoder: the result of its own forward, in a fraction of the memory.

A tile is a number of rows, as wide as the frame. Layers run one after another, each over all tiles.
"""

from .kl import decode_into, encode_mode, supports_row_tiles
from .settings import ONE_FRAME_UNTILED, TilingSettings
from .temporal import decode_clip_into

__all__ = [
    "ONE_FRAME_UNTILED",
    "TilingSettings",
    "decode_clip_into",
    "decode_into",
    "encode_mode",
    "supports_row_tiles",
]
