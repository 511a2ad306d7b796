"""Exact execution of a denoiser in pieces: the plain forward's result, in a fraction of its activation memory."""

from ..placement.layer_calls import LayerCall, LayerKind, LayerRunner, Unit
from .execution import DistinctPieces, ShapeOnlyRunner
from .inject import replace_forward
from .settings import ChunkSettings
from .unet3d import chunked

__all__ = [
    "ChunkSettings",
    "DistinctPieces",
    "LayerCall",
    "LayerKind",
    "LayerRunner",
    "ShapeOnlyRunner",
    "Unit",
    "chunked",
    "replace_forward",
]
