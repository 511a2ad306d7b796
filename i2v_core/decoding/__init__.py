"""Exact execution of an autoencoder in bands of rows: the plain result, in a fraction of its memory."""

from .kl import decode_into, encode_mode, runs_in_bands
from .pieces import ONE_WHOLE_FRAME, TilingSettings
from .temporal import decode_clip_into

__all__ = ["ONE_WHOLE_FRAME", "TilingSettings", "decode_clip_into", "decode_into", "encode_mode", "runs_in_bands"]
