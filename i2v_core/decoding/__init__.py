"""Exact execution of an image autoencoder in bands of rows: the plain result, in a fraction of its memory."""

from .kl import decode_into, encode_mode, runs_in_bands
from .pieces import ONE_WHOLE_FRAME, FramePieces

__all__ = ["ONE_WHOLE_FRAME", "FramePieces", "decode_into", "encode_mode", "runs_in_bands"]
