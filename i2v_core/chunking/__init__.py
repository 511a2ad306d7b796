"""Chunked execution of a denoiser: the result of its own forward, in a fraction of the activation memory."""

from ..placement.layer_calls import LayerCall, LayerKind, LayerRunner, Unit
from .execution import DistinctChunks, ShapeOnlyRunner
from .inject import replace_forward
from .settings import ChunkSettings
from .unet3d import chunked

__all__ = [
    "ChunkSettings",
    "DistinctChunks",
    "LayerCall",
    "LayerKind",
    "LayerRunner",
    "ShapeOnlyRunner",
    "Unit",
    "chunked",
    "replace_forward",
]
