"""Peaks of sampling and decode at some sizes: as the model's own code runs, in pieces, and streamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..decoding import ONE_WHOLE_FRAME
from ..families import Architecture, VideoSize, family_of
from ..units import MIB
from .plan import DecodeSettings, SampleSettings
from .predict import predict_decode, predict_sample
from .request import Request
from .trace import activation_bytes, skeleton, weights_bytes

SIZES = tuple(
    VideoSize(width_pixels=width, height_pixels=height, frames=frames)
    for width, height, frames in ((512, 512, 16), (768, 768, 24), (1280, 704, 16), (1024, 1024, 32))
)

# A workspace that costs few pieces more: see the table of layer calls in docs/memory-model.md.
_WORKSPACE_BYTES = 128 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """Weights and live tensors at the peak, in bytes.

    `stock`: the model's own forward with both guidance branches in one pass. `resident`: weights in place, guidance in
    two passes, layers in pieces. `streamed`: the same with weights coming in layer by layer. `decode`: frame by frame.
    """

    size: VideoSize
    stock_bytes: int
    resident_bytes: int
    streamed_bytes: int
    decode_bytes: int

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
    return tuple(_row(Request(architecture=architecture, size=size), dtype) for size in SIZES)


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
        decode_bytes=predict_decode(request, DecodeSettings(frames=ONE_WHOLE_FRAME), dtype).peak_bytes,
    )


def _stock_bytes(request: Request, dtype: torch.dtype) -> int:
    family = family_of(request.architecture)
    workload = family.denoise_workload(request.architecture, request.size, request.branches)
    module = skeleton(request.architecture, family.denoiser, dtype)
    return weights_bytes(request.architecture, family.denoiser, dtype) + activation_bytes(module, workload, dtype)
