"""Exact execution of a denoiser in pieces: the plain forward's result, in a fraction of its activation memory."""

from .execution import DistinctPieces, LayerCall, LayerKind, LayerRunner, Outline
from .inject import chunked
from .settings import ChunkSettings

__all__ = ["ChunkSettings", "DistinctPieces", "LayerCall", "LayerKind", "LayerRunner", "Outline", "chunked"]
