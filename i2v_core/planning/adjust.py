"""Changing a plan after it was made: for less free memory, or for a tile that the user sets."""

from __future__ import annotations

from dataclasses import replace

from ..errors import BadInputError, DoesNotFitError
from ..families import DecodeTile, family_of
from ..units import format_gib
from .candidates import TILE_OVERLAP, chunk_sizes
from .margin import needed_bytes
from .plan import Plan, Stage
from .planner import make_plan
from .predict import predict_decode


def refit(plan: Plan, stage: Stage, free_bytes: int) -> Plan:
    """The same plan where the stage fits what is free now; else one made again for that.

    Raises:
        DoesNotFitError: nothing fits what is free now.
    """
    needed = needed_bytes(plan.stage(stage), plan.device) + plan.budget.reserve_bytes
    if needed <= free_bytes:
        return plan
    return make_plan(plan.request, replace(plan.budget, free_bytes=free_bytes), plan.device)


def with_tile(plan: Plan, tile_pixels: int, overlap_pixels: int) -> Plan:
    """The plan with the user's tile, each 0 meaning the plan's own; as many frames at once as fit.

    Raises:
        BadInputError: a tile or an overlap that cannot be.
        DoesNotFitError: one frame in such tiles does not fit the budget.
    """
    facts, own = family_of(plan.request.architecture).facts, plan.decode.tile
    size_pixels = tile_pixels or own.size_pixels
    if not size_pixels:
        raise BadInputError(
            f"an overlap of {overlap_pixels} pixels needs tiles, and the plan decodes whole frames",
            "set a tile size too, or set the overlap to 0",
        )
    least_pixels = 8 * facts.spatial_compression
    if size_pixels % facts.spatial_compression or size_pixels < least_pixels:
        raise BadInputError(
            f"a tile of {size_pixels} pixels is not possible",
            f"use a multiple of {facts.spatial_compression}, at least {least_pixels}, or 0",
        )
    overlap = overlap_pixels or int(size_pixels * TILE_OVERLAP)
    if overlap > size_pixels // 2:
        raise BadInputError(
            f"an overlap of {overlap} pixels is more than half of a tile of {size_pixels}",
            f"use at most {size_pixels // 2}",
        )
    tile = DecodeTile(size_pixels=size_pixels, overlap_pixels=overlap)
    needed = 0
    for chunk_size in chunk_sizes(plan.request):
        settings = replace(plan.decode, chunk_size=chunk_size, tile=tile)
        prediction = predict_decode(plan.request, settings, plan.sample.compute_dtype)
        needed = needed_bytes(prediction, plan.device)
        if needed <= plan.budget.usable_bytes:
            stages = tuple(prediction if old.stage is Stage.DECODE else old for old in plan.stages)
            return replace(plan, decode=settings, stages=stages)
    raise DoesNotFitError(
        f"decode in tiles of {size_pixels} pixels needs {format_gib(needed)}, and "
        f"{format_gib(plan.budget.usable_bytes)} can be used",
        "use a smaller tile, or 0 for the plan's own",
    )
