"""A table of predicted peaks of sampling and decode: the model's own forward, chunked, and streamed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..decoding import ONE_FRAME_UNTILED, TilingSettings
from ..families import Architecture, VideoSize, family_of
from ..units import MIB
from .candidates import decode_tiling
from .plan import DecodeSettings, SampleSettings
from .predict import predict_decode, predict_sample
from .request import Request
from .trace import activation_bytes, skeleton, weights_bytes

# A workspace that adds few layer calls: see their table in docs/memory-model.md.
_WORKSPACE_BYTES = 128 * MIB
# For decoders that must see several frames at once.
_TILE_PIXELS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """Predicted peaks for one size: weights and live tensors, in bytes."""

    size: VideoSize

    stock_bytes: int
    """Sampling by the model's own forward, with both guidance branches in one pass."""

    resident_bytes: int
    """Sampling with weights on the device, guidance in two passes, chunked layers."""

    streamed_bytes: int
    """The same with weights streamed layer by layer."""

    decode_bytes: int
    """Decode of as few frames at once as the decoder accepts; where these are several, in tiles, with feature maps in
    host memory."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "width": self.size.width_pixels,
            "height": self.size.height_pixels,
            "frames": self.size.frames,
            "stock_bytes": self.stock_bytes,
            "resident_bytes": self.resident_bytes,
            "streamed_bytes": self.streamed_bytes,
            "decode_bytes": self.decode_bytes,
        }


def memory_table(architecture: Architecture, dtype: torch.dtype) -> tuple[MemoryRow, ...]:
    """A row for each of the family's table sizes."""
    facts = family_of(architecture).facts
    sizes = facts.table_sizes or (facts.default_size,)
    return tuple(_row(Request(architecture=architecture, size=size), dtype) for size in sizes)


def _row(request: Request, dtype: torch.dtype) -> MemoryRow:
    def sample_bytes(*, streamed: bool) -> int:
        settings = SampleSettings(
            compute_dtype=dtype, batched_guidance=False, workspace_bytes=_WORKSPACE_BYTES, streamed=streamed
        )
        return predict_sample(request, settings).peak_bytes

    return MemoryRow(
        size=request.size,
        stock_bytes=_stock_bytes(request, dtype),
        resident_bytes=sample_bytes(streamed=False),
        streamed_bytes=sample_bytes(streamed=True),
        decode_bytes=predict_decode(request, DecodeSettings(tiling=_decode_tiling(request)), dtype).peak_bytes,
    )


def _decode_tiling(request: Request) -> TilingSettings:
    tiling = decode_tiling(request, _TILE_PIXELS)
    return ONE_FRAME_UNTILED if tiling.chunk_size == 1 else replace(tiling, maps_bytes=0)


def _stock_bytes(request: Request, dtype: torch.dtype) -> int:
    family = family_of(request.architecture)
    workload = family.denoise_workload(request.architecture, request.size, request.branches)
    denoiser = family.denoisers(request.architecture)[0].component
    module = skeleton(request.architecture, denoiser, dtype)
    return weights_bytes(request.architecture, denoiser, dtype) + activation_bytes(module, workload, dtype)
