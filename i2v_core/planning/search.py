"""The search: of a stage's candidates, the fastest that fits, and the one that needs the least device memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TypeVar

import torch

from ..memory.device import DeviceFacts
from .approximations import EXACT, Approximation, lowest_memory_approximations
from .candidates import (
    chunked_candidates,
    decode_candidates,
    encode_candidates,
    sample_candidates,
    smallest_sample_candidates,
)
from .cost import min_sample_cost, sample_cost
from .fit_limit import FitLimit
from .plan import (
    DecodePlan,
    DecodeSettings,
    EncodePlan,
    EncodeSettings,
    SamplePlan,
    SamplePrediction,
    SampleSettings,
    StagePlan,
    StagePrediction,
    StageSettings,
)
from .predict import predict_decode, predict_encode, predict_sample
from .request import Request

Candidate = TypeVar("Candidate", bound=StageSettings)
Predicted = TypeVar("Predicted", bound=StagePrediction)


def cheapest_encode(request: Request, dtype: torch.dtype, limit: FitLimit) -> EncodePlan | None:
    """The fastest settings that fit; None where none do."""

    def predict(settings: EncodeSettings) -> StagePrediction:
        return predict_encode(request, settings, dtype)

    # Tiles do not help where the encoders of text and of the picture's content do not fit.
    groups = [
        group
        for group in encode_candidates(request)
        if limit.allows(predict_encode(request, group[0], dtype, of_any_size=True))
    ]
    # The untiled picture fits nearly always, so it is tried before tiles are traced.
    untiled = [group[0] for group in groups[:1]]
    return _first_in_order(untiled, predict, limit) or _cheapest_of_groups(groups, predict, limit)


def cheapest_sample(
    request: Request, dtype: torch.dtype, limit: FitLimit, approximation: Approximation = EXACT
) -> SamplePlan | None:
    """The cheapest settings that fit; None where none do.

    Bisects the workspaces of each combination of the other settings, those of the cheapest combination first.
    """

    def predict(settings: SampleSettings) -> SamplePrediction:
        return predict_sample(request, settings)

    smallest = smallest_sample_candidates(request, dtype, approximation)
    if not any(limit.allows(predict(settings)) for settings in smallest):
        return None
    best: SamplePlan | None = None
    best_cost = math.inf
    candidates = sample_candidates(request, dtype, approximation)
    for settings in sorted(candidates, key=lambda it: min_sample_cost(request, it)):
        if min_sample_cost(request, settings) >= best_cost:
            break
        found = first_that_fits(chunked_candidates(settings), predict, limit)
        if found is not None and (cost := sample_cost(request, found)) < best_cost:
            best, best_cost = found, cost
    return best


def cheapest_decode(request: Request, dtype: torch.dtype, limit: FitLimit) -> DecodePlan | None:
    """The fastest settings that fit; None where none do."""

    def predict(settings: DecodeSettings) -> StagePrediction:
        return predict_decode(request, settings, dtype)

    return _cheapest_of_groups(decode_candidates(request), predict, limit)


def first_encode(request: Request, dtype: torch.dtype, limit: FitLimit) -> EncodePlan | None:
    """The first of all candidates that fits. Slower than `cheapest_encode`, but does not rely on their order: a large
    tile may need more than the untiled picture.
    """

    def predict(settings: EncodeSettings) -> StagePrediction:
        return predict_encode(request, settings, dtype)

    return _first_in_order(chain(*encode_candidates(request)), predict, limit)


def first_decode(request: Request, dtype: torch.dtype, limit: FitLimit) -> DecodePlan | None:
    """The first of all candidates that fits, as `first_encode`."""

    def predict(settings: DecodeSettings) -> StagePrediction:
        return predict_decode(request, settings, dtype)

    return _first_in_order(chain(*decode_candidates(request)), predict, limit)


def fits(request: Request, device: DeviceFacts, limit: FitLimit) -> bool:
    """Whether each stage fits with its lowest-memory settings."""
    return limit.allows(min_peak(request, device, limit.host_bytes))


def min_peak(request: Request, device: DeviceFacts, host_free_bytes: int | None = None) -> StagePrediction:
    """The stage of `lowest_memory_stages` with the highest peak."""
    return max(lowest_memory_stages(request, device, host_free_bytes), key=_peak_bytes)


def lowest_memory_stages(
    request: Request, device: DeviceFacts, host_free_bytes: int | None = None
) -> tuple[StagePrediction, ...]:
    """`lowest_memory` in the precision that needs least, of those the request allows on the device."""
    by_precision = (lowest_memory(request, dtype, host_free_bytes) for dtype in request.precisions(device.precisions))
    return min(by_precision, key=lambda stages: max(map(_peak_bytes, stages)))


def lowest_memory(request: Request, dtype: torch.dtype, host_free_bytes: int | None) -> tuple[StagePrediction, ...]:
    """Predictions of all stages, each with the settings that need the least device memory, however slow they are.

    Only settings that the host's memory allows (None: any amount) count; where it allows none, those that need the
    least of it.
    """
    by_stage: tuple[list[StagePrediction], ...] = (
        [predict_encode(request, group[-1], dtype) for group in encode_candidates(request)],
        [
            predict_sample(request, settings)
            for approximation in lowest_memory_approximations(request)
            for settings in smallest_sample_candidates(request, dtype, approximation)
        ],
        [predict_decode(request, group[-1], dtype) for group in decode_candidates(request)],
    )
    return tuple(_lowest_of(predictions, host_free_bytes) for predictions in by_stage)


def first_that_fits(
    candidates: Sequence[Candidate], predict: Callable[[Candidate], Predicted], limit: FitLimit
) -> StagePlan[Candidate, Predicted] | None:
    """The first candidate that fits, by bisection: each must need less than those before it."""
    found: StagePlan[Candidate, Predicted] | None = None
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        prediction = predict(candidates[middle])
        if limit.allows(prediction):
            found, high = StagePlan(candidates[middle], prediction), middle
        else:
            low = middle + 1
    return found


def _first_in_order(
    candidates: Iterable[Candidate], predict: Callable[[Candidate], Predicted], limit: FitLimit
) -> StagePlan[Candidate, Predicted] | None:
    stage_plans = (StagePlan(settings, predict(settings)) for settings in candidates)
    return next((it for it in stage_plans if limit.allows(it.prediction)), None)


def _cheapest_of_groups(
    groups: Sequence[Sequence[Candidate]], predict: Callable[[Candidate], Predicted], limit: FitLimit
) -> StagePlan[Candidate, Predicted] | None:
    for group in groups:
        # A group's last candidate needs the least of the device: where that does not fit, none of the group does.
        if not limit.any_host.allows(predict(group[-1])):
            continue
        # Candidates that need less device memory may need more host memory, which bisection does not expect.
        found = first_that_fits(group, predict, limit) or _first_in_order(group, predict, limit)
        if found is not None:
            return found
    return None


def _lowest_of(predictions: Sequence[StagePrediction], host_free_bytes: int | None) -> StagePrediction:
    allowed = [it for it in predictions if host_free_bytes is None or it.host_bytes <= host_free_bytes]
    least_host = min(predictions, key=lambda it: it.host_bytes)
    return min(allowed, key=_peak_bytes, default=least_host)


def _peak_bytes(prediction: StagePrediction) -> int:
    return prediction.peak_bytes
