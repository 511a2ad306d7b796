"""Exact execution of a denoiser in pieces: the plain forward's result, in a fraction of its activation memory."""

from .execution import DistinctPieces, LayerCall, LayerKind, LayerRunner, Outline, Unit
from .inject import forward_replaced
from .settings import ChunkSettings
from .unet3d import chunked

__all__ = [
    "ChunkSettings",
    "DistinctPieces",
    "LayerCall",
    "LayerKind",
    "LayerRunner",
    "Outline",
    "Unit",
    "chunked",
    "forward_replaced",
]
