"""Choosing the fastest way that fits.

Candidates are tried from fast to slow; the first whose predicted peak, with its margin, is within the budget is taken.
The order rests on what each choice costs in time: running layers in pieces costs little while pieces are large,
splitting guidance into two passes costs the deep, launch-bound levels a second time, small pieces cost most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from ..families import DecodeTile, family_of
from ..memory.device import DeviceFacts
from ..units import GIB, MIB, format_gib
from .nearest import NothingFitsError, nearest
from .plan import DecodeSettings, Plan, SampleSettings, StagePrediction
from .predict import predict_decode, predict_encode, predict_sample
from .report import plan_reasons
from .request import Budget, Request

Settings = TypeVar("Settings")
Prediction = TypeVar("Prediction", bound=StagePrediction)

# What a prediction is raised by before it is held against the budget: libraries' own workspaces and the allocator's
# rounding of large blocks, which a trace of live tensors does not see.
_MARGIN_RATIO = 0.03
_CUDA_LIBRARIES_BYTES = 64 * MIB

_WORKSPACES_BYTES = (None, GIB, 512 * MIB, 256 * MIB, 128 * MIB, 64 * MIB, 32 * MIB, 16 * MIB, 4 * MIB, MIB)
_TILES_PIXELS = (512, 384, 256, 192, 128)

TILE_OVERLAP = 0.25
"""Overlap of the decoder's tiles, as a share of a tile."""


def make_plan(request: Request, budget: Budget, device: DeviceFacts) -> Plan:
    """The fastest plan that fits the budget. Deterministic.

    Raises:
        NothingFitsError: nothing fits; it names the nearest requests and budgets that would.
    """
    for dtype in request.precisions(device.precisions):
        plan = _plan_in(request, budget, device, dtype)
        if plan is not None:
            return plan
    least = least_peak(request, device)
    needed = needed_bytes(least, device)
    raise NothingFitsError(
        f"{request.size} with {family_of(request.architecture).facts.display_name} does not fit: the "
        f"{least.stage.value} stage needs {format_gib(needed)} at least, and "
        f"{format_gib(budget.usable_bytes)} can be used",
        nearest(request, needed + budget.reserve_bytes, lambda other: fits(other, budget, device)),
    )


def needed_bytes(prediction: StagePrediction, device: DeviceFacts) -> int:
    """A predicted peak with its margin: what must be free for the stage to run safely."""
    libraries_bytes = _CUDA_LIBRARIES_BYTES if device.torch_device.type == "cuda" else 0
    return int(prediction.peak_bytes * (1 + _MARGIN_RATIO)) + libraries_bytes


def fits(request: Request, budget: Budget, device: DeviceFacts) -> bool:
    """Whether the thriftiest way to make the request is within the budget."""
    return needed_bytes(least_peak(request, device), device) <= budget.usable_bytes


def least_peak(request: Request, device: DeviceFacts) -> StagePrediction:
    """The binding stage of the thriftiest plan, whatever its time."""
    peaks = [_thriftiest(request, dtype) for dtype in request.precisions(device.precisions)]
    return min(peaks, key=lambda prediction: prediction.peak_bytes)


def _thriftiest(request: Request, dtype: torch.dtype) -> StagePrediction:
    stages = (
        predict_encode(request, dtype),
        predict_sample(request, list(_sample_candidates(request, dtype))[-1]),
        predict_decode(request, list(_decode_candidates(request))[-1], dtype),
    )
    return max(stages, key=lambda prediction: prediction.peak_bytes)


def _plan_in(request: Request, budget: Budget, device: DeviceFacts, dtype: torch.dtype) -> Plan | None:
    def fit(prediction: StagePrediction) -> bool:
        return needed_bytes(prediction, device) <= budget.usable_bytes

    encode = predict_encode(request, dtype)
    if not fit(encode):
        return None
    sample = _first_fit(_sample_candidates(request, dtype), lambda it: predict_sample(request, it), fit)
    decode = _first_fit(_decode_candidates(request), lambda it: predict_decode(request, it, dtype), fit)
    if sample is None or decode is None:
        return None
    settings, sample_prediction = sample
    decode_settings, decode_prediction = decode
    stages = (encode, sample_prediction, decode_prediction)
    return Plan(
        request=request,
        device=device,
        budget=budget,
        sample=settings,
        decode=decode_settings,
        chunk_size=sample_prediction.chunk_size,
        stages=stages,
        reasons=plan_reasons(request, budget, settings, decode_settings, sample_prediction.chunk_size, stages),
    )


def _first_fit(
    candidates: Iterator[Settings],
    predict: Callable[[Settings], Prediction],
    fit: Callable[[StagePrediction], bool],
) -> tuple[Settings, Prediction] | None:
    for settings in candidates:
        prediction = predict(settings)
        if fit(prediction):
            return settings, prediction
    return None


def _sample_candidates(request: Request, dtype: torch.dtype) -> Iterator[SampleSettings]:
    for workspace_bytes in _WORKSPACES_BYTES:
        for batched in (True, False) if request.guidance else (True,):
            yield SampleSettings(compute_dtype=dtype, batched_guidance=batched, workspace_bytes=workspace_bytes)


def _decode_candidates(request: Request) -> Iterator[DecodeSettings]:
    """Whole frames, many at once and then fewer; then tiles of one frame, large ones first."""
    for chunk_size in chunk_sizes(request):
        yield DecodeSettings(chunk_size=chunk_size)
    longest_pixels = max(request.size.width_pixels, request.size.height_pixels)
    for tile_pixels in _TILES_PIXELS:
        if tile_pixels < longest_pixels:
            tile = DecodeTile(size_pixels=tile_pixels, overlap_pixels=int(tile_pixels * TILE_OVERLAP))
            yield DecodeSettings(chunk_size=1, tile=tile)


def chunk_sizes(request: Request) -> list[int]:
    """Numbers of frames to decode at once, from all to one, halving."""
    sizes = [request.size.frames]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes
