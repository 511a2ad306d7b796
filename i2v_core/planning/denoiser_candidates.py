"""The ways in which the denoiser could run, and the cheapest of them that fits; and what a request needs at least."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

from ..families import family_of
from ..units import GIB, MIB
from .approximations import EXACT, Approximation, lowest_memory_approximations
from .autoencoder_candidates import Candidate, Fits, decode_candidates, encode_candidates, first_that_fits
from .cost import least_sample_cost, sample_cost
from .plan import SamplePrediction, SampleSettings, StagePrediction
from .predict import predict_decode, predict_encode, predict_sample
from .request import Request

_WORKSPACES_BYTES = (None, 4 * GIB, 2 * GIB, GIB, 512 * MIB, 256 * MIB, 128 * MIB, 64 * MIB, 16 * MIB, 4 * MIB, MIB)


def cheapest_sample(
    request: Request, dtype: torch.dtype, fits: Fits, approximation: Approximation = EXACT
) -> Candidate[SampleSettings, SamplePrediction] | None:
    """Searches workspaces within each way to place weights, skips and guidance, the ways from cheap to dear."""
    if not any(fits(predict_sample(request, way)) for way in _smallest_candidates(request, dtype, approximation)):
        return None
    best: Candidate[SampleSettings, SamplePrediction] | None = None
    best_cost = math.inf
    ways = [approximation.applied_to(way) for way in _sample_candidates(request, dtype)]
    for way in sorted(ways, key=lambda it: least_sample_cost(request, it)):
        if least_sample_cost(request, way) >= best_cost:
            break
        found = _largest_workspace(request, way, fits)
        if found is not None and (cost := sample_cost(request, found.settings, found.prediction)) < best_cost:
            best, best_cost = found, cost
    return best


def lowest_memory(request: Request, dtype: torch.dtype, host_free_bytes: int | None) -> tuple[StagePrediction, ...]:
    """The stages when each runs in the way that takes least of the device, whatever its time.

    Ways that host memory does not allow are left out; where it allows none, those that take least of it are taken.
    """
    by_stage: tuple[list[StagePrediction], ...] = (
        [predict_encode(request, group[-1], dtype) for group in encode_candidates(request)],
        [
            predict_sample(request, way)
            for approximation in lowest_memory_approximations(request)
            for way in _smallest_candidates(request, dtype, approximation)
        ],
        [predict_decode(request, group[-1], dtype) for group in decode_candidates(request)],
    )
    stages: list[StagePrediction] = []
    for ways in by_stage:
        allowed = [way for way in ways if host_free_bytes is None or way.host_bytes <= host_free_bytes]
        least_host = min(ways, key=lambda it: it.host_bytes)
        stages.append(min(allowed, key=lambda it: it.peak_bytes, default=least_host))
    return tuple(stages)


def _sample_candidates(request: Request, dtype: torch.dtype) -> Iterator[SampleSettings]:
    batched = (True, False) if request.guidance else (True,)
    for parked, streamed, together in product(_offload_choices(request), (False, True), batched):
        yield SampleSettings(compute_dtype=dtype, batched_guidance=together, streamed=streamed, offload_skips=parked)


def _offload_choices(request: Request) -> tuple[bool, ...]:
    """Whether skip connections may be parked, from cheap to dear."""
    return (False, True) if family_of(request.architecture).facts.has_skips else (False,)


def _smallest_candidates(request: Request, dtype: torch.dtype, approximation: Approximation) -> list[SampleSettings]:
    """Those with the least activations, of which one takes least of the device and one of host memory."""
    smallest = SampleSettings(compute_dtype=dtype, batched_guidance=False, workspace_bytes=_WORKSPACES_BYTES[-1])
    return [
        approximation.applied_to(replace(smallest, streamed=streamed, offload_skips=parked))
        for streamed, parked in product((True, False), _offload_choices(request)[::-1])
    ]


def _largest_workspace(
    request: Request, way: SampleSettings, fits: Fits
) -> Candidate[SampleSettings, SamplePrediction] | None:
    """The smaller the workspace, the lower the peak and the more pieces."""
    settings = [replace(way, workspace_bytes=workspace_bytes) for workspace_bytes in _WORKSPACES_BYTES]
    return first_that_fits(settings, lambda it: predict_sample(request, it), fits)
