"""Planner inputs from the widgets of VRAM Budget, the same for the run and for the live plan on the page."""

from __future__ import annotations

from dataclasses import dataclass

from ..i2v_core.errors import BadInputError
from ..i2v_core.families import Architecture, VideoSize
from ..i2v_core.memory.device import DeviceFacts
from ..i2v_core.placement.precision import AUTO
from ..i2v_core.planning.cards import CARDS, THIS_MACHINE
from ..i2v_core.planning.request import Budget, Request
from ..i2v_core.units import GIB, parse_bytes
from . import host


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerInputs:
    """The arguments of `make_plan`."""

    request: Request
    budget: Budget
    device: DeviceFacts


def planner_inputs(
    architecture: Architecture,
    *,
    width: int,
    height: int,
    frames: int,
    guidance: bool,
    precision: str,
    budget: str,
    reserve_gib: float,
    allow_approximate: bool = False,
    plan_for: str = THIS_MACHINE,
) -> PlannerInputs:
    """Build the planner's inputs; arguments are named like the widgets. Raise `BadInputError` for invalid values."""
    request = Request(
        architecture=architecture,
        size=VideoSize(width_pixels=width, height_pixels=height, frames=frames),
        guidance=guidance,
        precision=precision,
        allow_approximate=allow_approximate,
    )
    if not 0 <= reserve_gib < float("inf"):
        raise BadInputError(f"{reserve_gib} GiB is not a valid reserve", "use zero or more")
    limit_bytes = None if budget.strip().lower() == AUTO else parse_bytes(budget)
    reserve_bytes = int(reserve_gib * GIB)
    if plan_for == THIS_MACHINE:
        return PlannerInputs(
            request=request,
            budget=_budget_here(limit_bytes, reserve_bytes),
            device=host.plan_device(architecture),
        )
    if plan_for not in CARDS:
        raise BadInputError(f"'{plan_for}' is not a known card", f"choose one of {', '.join((THIS_MACHINE, *CARDS))}")
    card = CARDS[plan_for]
    return PlannerInputs(
        request=request,
        budget=Budget(
            free_bytes=card.free_bytes,
            limit_bytes=card.free_bytes if limit_bytes is None else limit_bytes,
            reserve_bytes=reserve_bytes,
            host_free_bytes=host.ram_free_bytes(),
        ),
        device=card.facts,
    )


def _budget_here(limit_bytes: int | None, reserve_bytes: int) -> Budget:
    # The host's reserve applies to free memory only; a budget that the user sets may be used up completely.
    host_reserve_bytes = host.reserve_bytes() if limit_bytes is None else 0
    return Budget(
        free_bytes=host.reclaimable_bytes(),
        limit_bytes=limit_bytes,
        reserve_bytes=reserve_bytes + host_reserve_bytes,
        host_free_bytes=host.host_free_bytes(),
    )
