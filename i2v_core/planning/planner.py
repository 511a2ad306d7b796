"""Planning: the fastest settings that fit, or a refusal that says what would fit instead.

Each stage is searched on its own, since one stage is on the device at a time.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from ..families import family_of
from ..memory.device import DeviceFacts
from ..units import format_gib
from .approximations import Approximation, approximations
from .fit_limit import FitLimit
from .margin import needed_bytes
from .plan import Plan
from .request import Budget, Request
from .search import cheapest_decode, cheapest_encode, cheapest_sample, lowest_memory, min_peak
from .suggestions import NothingFitsError, suggestions


def make_plan(request: Request, budget: Budget, device: DeviceFacts) -> Plan:
    """The fastest plan that fits the budget. Deterministic.

    Raises:
        NothingFitsError: nothing fits; it suggests requests and budgets that would.
    """
    plan = find_plan(request, budget, device)
    if plan is None:
        raise _refusal(request, budget, device)
    return plan


def find_plan(request: Request, budget: Budget, device: DeviceFacts) -> Plan | None:
    """The fastest plan that fits the budget; None where none does.

    Exact plans come first, in any of the precisions, then approximate ones, in the best precision first.
    """
    for approximation, dtype in product(approximations(request), request.precisions(device.precisions)):
        plan = _plan_in(request, budget, device, dtype, approximation)
        if plan is not None:
            return plan
    return None


def _plan_in(
    request: Request, budget: Budget, device: DeviceFacts, dtype: torch.dtype, approximation: Approximation
) -> Plan | None:
    limit = FitLimit.of(budget, device)
    # Sampling fails most often, and is the fastest to find that out.
    sample = cheapest_sample(request, dtype, limit, approximation)
    if sample is None:
        return None
    encode = cheapest_encode(request, dtype, limit)
    decode = cheapest_decode(request, dtype, limit)
    if encode is None or decode is None:
        return None
    return Plan(request=request, device=device, budget=budget, encode=encode, sample=sample, decode=decode)


def _refusal(request: Request, budget: Budget, device: DeviceFacts) -> NothingFitsError:
    least = min_peak(request, device, budget.host_free_bytes)
    needed = needed_bytes(least, device)
    problem = (
        f"{request.size} with {family_of(request.architecture).facts.display_name} does not fit: the "
        f"{least.stage.value} stage needs {format_gib(needed)} at least, and "
        f"{format_gib(budget.usable_bytes)} can be used"
    )
    host_bytes = _sufficient_host_bytes(request, budget, device)
    if host_bytes is not None:
        problem += f" (less is enough with {format_gib(host_bytes)} of free host memory to stream from)"
    suggested = suggestions(
        request,
        device,
        FitLimit.of(budget, device),
        budget_bytes=needed + budget.reserve_bytes,
        host_bytes=host_bytes,
        approximation=_sufficient_approximation(request, budget, device),
    )
    return NothingFitsError(problem, least, suggested)


def _sufficient_host_bytes(request: Request, budget: Budget, device: DeviceFacts) -> int | None:
    """The free host memory with which the request would fit unchanged; None where more of it would not help."""
    if budget.host_free_bytes is None:
        return None
    limit = FitLimit.of(budget, device).any_host
    for dtype in request.precisions(device.precisions):
        stages = lowest_memory(request, dtype, host_free_bytes=None)
        if all(limit.allows(stage) for stage in stages):
            return max(stage.host_bytes for stage in stages)
    return None


def _sufficient_approximation(request: Request, budget: Budget, device: DeviceFacts) -> str | None:
    """The approximation with which the request would fit, were it allowed; None where none is enough."""
    if request.allow_approximate:
        return None
    plan = find_plan(replace(request, allow_approximate=True), budget, device)
    return None if plan is None else str(Approximation.of(plan.sample.settings))
