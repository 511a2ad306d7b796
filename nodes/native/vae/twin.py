"""The memory of an autoencoder's passes, traced on a twin on the meta device."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.model import pytorch_attention
from torch import nn

from ....i2v_core.chunking import DistinctChunks
from ....i2v_core.memory.meter import StorageMeter, fused_attention
from ....i2v_core.placement.offload import empty_on_host
from ..meta_model import on_meta
from .bands import BandedPass, Bands
from .model import NativeVAE, Video

_META = torch.device("meta")
_STOCK_LATENT_FRAMES = 7
"""Latent frames by which core's own code, that runs a few at a time, has reached its peak but for the pixels that it
collects."""


class VAETwin:
    """An autoencoder's shape, for tracing its passes over one clip.

    Args:
        native: the file that knows the autoencoder.
        model: the autoencoder; it is not changed.
        dtype: the precision in which it computes.
    """

    def __init__(self, native: NativeVAE, model: nn.Module, dtype: torch.dtype) -> None:
        self._native, self._dtype = native, dtype
        self._model: Any = on_meta(model, ()).to(dtype)
        for module in self._model.modules():
            if hasattr(module, "optimized_attention"):
                module.optimized_attention = pytorch_attention  # others look at the device's free memory
        self.decode_bytes = lru_cache(maxsize=256)(self._decode_bytes)
        self.encode_bytes = lru_cache(maxsize=256)(self._encode_bytes)

    def _decode_bytes(self, shape: tuple[int, ...], bands: Bands | None) -> int:
        """The highest sum of live activations while a latent (1, C, T, h, w) is decoded."""
        native = self._native
        frames = self._traced_frames(shape[2], bands)
        latent_shape = (*shape[:2], frames, *shape[3:])
        with torch.no_grad(), fused_attention(), StorageMeter(device_type="meta") as meter:
            if bands is None:
                latent = torch.empty(latent_shape, dtype=self._dtype, device=_META)
                pixels = self._model.decode(latent)
                # Each is there twice at most: before frames are joined and after, before the first layer and after.
                further = _further_bytes(pixels, native.frames(shape[2])) + _further_bytes(latent, shape[2])
                return meter.peak_bytes + 2 * further
            latent = empty_on_host(latent_shape, self._dtype, _META)
            native.decode(self._model, latent, self._banded(bands), write=lambda *_: None)
        return meter.peak_bytes

    def _encode_bytes(self, shape: tuple[int, ...], bands: Bands | None) -> int:
        """The same while pixels (1, C, F, H, W) are encoded."""
        native = self._native
        frames = native.frames(self._traced_frames(native.latent_frames(shape[2]), bands))

        def empty(frames: slice) -> torch.Tensor:
            return torch.empty((*shape[:2], frames.stop - frames.start, *shape[3:]), dtype=self._dtype, device=_META)

        with torch.no_grad(), fused_attention(), StorageMeter(device_type="meta") as meter:
            if bands is None:
                latent = self._model.encode(empty(slice(0, frames)))
                pixels = empty(slice(0, 1))
                latents = _further_bytes(latent, native.latent_frames(shape[2]))
                further = _further_bytes(pixels, 1 + shape[2] - frames) + 2 * latents
                # Pixels are there twice while their squares are folded, if they are.
                return max(meter.peak_bytes + further, 2 * shape[2] * pixels.nbytes)
            video = Video(frames=frames, height=shape[3], width=shape[4], read=empty)
            native.encode(self._model, video, self._banded(bands))
        return meter.peak_bytes

    def _traced_frames(self, latent_frames: int, bands: Bands | None) -> int:
        """Latent frames of a clip that tells the peak of the whole one."""
        steady = self._native.steady_latent_frames
        if steady is None:
            return latent_frames
        return min(latent_frames, _STOCK_LATENT_FRAMES if bands is None else steady)

    def _banded(self, bands: Bands) -> BandedPass:
        return BandedPass(device=_META, dtype=self._dtype, bands=bands, runner=DistinctChunks())


def _further_bytes(traced: torch.Tensor, frames: int) -> int:
    """Bytes of the frames of a clip beyond those that were traced."""
    return (frames - traced.shape[2]) * traced.untyped_storage().nbytes() // traced.shape[2]
