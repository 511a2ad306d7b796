"""Choosing the fastest way that fits.

Each stage has its own candidates, since one stage is on the device at a time: of those whose predicted peak, with its
margin, is within the budget, the cheapest by the cost model (`cost`) is taken, and of equals the first.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from ..families import family_of
from ..memory.device import DeviceFacts
from ..units import format_gib
from .approximations import Approximation, approximations
from .autoencoder_candidates import cheapest_decode, cheapest_encode
from .denoiser_candidates import cheapest_sample, lowest_memory
from .margin import needed_bytes
from .plan import Plan, StagePrediction
from .report import plan_reasons
from .request import Budget, Request
from .suggestions import NothingFitsError, suggestions


def make_plan(request: Request, budget: Budget, device: DeviceFacts) -> Plan:
    """The fastest plan that fits the budget. Deterministic.

    Raises:
        NothingFitsError: nothing fits; it names the nearest requests and budgets that would.
    """
    plan = find_plan(request, budget, device)
    if plan is None:
        raise _refusal(request, budget, device)
    return plan


def find_plan(request: Request, budget: Budget, device: DeviceFacts) -> Plan | None:
    """As `make_plan`, but None where nothing fits. Exact in any of the precisions before approximate in the best."""
    for approximation, dtype in product(approximations(request), request.precisions(device.precisions)):
        plan = _plan_in(request, budget, device, dtype, approximation)
        if plan is not None:
            return plan
    return None


def _refusal(request: Request, budget: Budget, device: DeviceFacts) -> NothingFitsError:
    least = min_peak(request, device, budget.host_free_bytes)
    needed = needed_bytes(least, device)
    problem = (
        f"{request.size} with {family_of(request.architecture).facts.display_name} does not fit: the "
        f"{least.stage.value} stage needs {format_gib(needed)} at least, and "
        f"{format_gib(budget.usable_bytes)} can be used"
    )
    host_bytes = _host_bytes_that_would_do(request, budget, device)
    if host_bytes is not None:
        problem += f" (less would do with {format_gib(host_bytes)} of free host memory to stream from)"
    near = suggestions(
        request,
        budget_bytes=needed + budget.reserve_bytes,
        host_bytes=host_bytes,
        approximation=_approximation_that_would_do(request, budget, device),
        fits=lambda other: fits(other, budget, device),
    )
    return NothingFitsError(problem, least, near)


def _host_bytes_that_would_do(request: Request, budget: Budget, device: DeviceFacts) -> int | None:
    """The free host memory with which the request would fit as it is; None where that is not what is missing."""
    if budget.host_free_bytes is None:
        return None
    for dtype in request.precisions(device.precisions):
        stages = lowest_memory(request, dtype, host_free_bytes=None)
        if all(needed_bytes(stage, device) <= budget.usable_bytes for stage in stages):
            return max(stage.host_bytes for stage in stages)
    return None


def _approximation_that_would_do(request: Request, budget: Budget, device: DeviceFacts) -> str | None:
    """What the request would give up to fit as it is, if it allowed that; None where even that does not do."""
    if request.allow_approximate:
        return None
    plan = find_plan(replace(request, allow_approximate=True), budget, device)
    return None if plan is None else str(Approximation.of(plan.sample))


def fits(request: Request, budget: Budget, device: DeviceFacts) -> bool:
    """Whether the thriftiest way to make the request is within the budget."""
    return _fits(min_peak(request, device, budget.host_free_bytes), budget, device)


def min_peak(request: Request, device: DeviceFacts, host_free_bytes: int | None = None) -> StagePrediction:
    """The binding stage of `least_stages`."""
    return max(lowest_memory_stages(request, device, host_free_bytes), key=_peak)


def lowest_memory_stages(
    request: Request, device: DeviceFacts, host_free_bytes: int | None = None
) -> tuple[StagePrediction, ...]:
    """The stages of the thriftiest plan that host memory (None: any) allows, whatever its time."""
    plans = (lowest_memory(request, dtype, host_free_bytes) for dtype in request.precisions(device.precisions))
    return min(plans, key=lambda stages: max(map(_peak, stages)))


def _peak(prediction: StagePrediction) -> int:
    return prediction.peak_bytes


def _fits(prediction: StagePrediction, budget: Budget, device: DeviceFacts) -> bool:
    return needed_bytes(prediction, device) <= budget.usable_bytes and budget.host_allows(prediction.host_bytes)


def _plan_in(
    request: Request, budget: Budget, device: DeviceFacts, dtype: torch.dtype, approximation: Approximation
) -> Plan | None:
    def fit(prediction: StagePrediction) -> bool:
        return _fits(prediction, budget, device)

    sample = cheapest_sample(request, dtype, fit, approximation)
    if sample is None:  # what fails most, and soonest
        return None
    encode = cheapest_encode(request, dtype, fit)
    decode = cheapest_decode(request, dtype, fit)
    if encode is None or decode is None:
        return None
    stages = (encode.prediction, sample.prediction, decode.prediction)
    return Plan(
        request=request,
        device=device,
        budget=budget,
        encode=encode.settings,
        sample=sample.settings,
        decode=decode.settings,
        chunk_size=sample.prediction.chunk_size,
        predictions=stages,
        reasons=plan_reasons(
            request, budget, encode.settings, sample.settings, decode.settings, sample.prediction.chunk_size, stages
        ),
    )
