"""Changing a plan after it was made: for less free memory, or for a tile that the user sets."""

from __future__ import annotations

from dataclasses import replace

from ..errors import BadInputError, DoesNotFitError
from ..families import family_of
from ..units import format_gib
from .autoencoder_candidates import decode_in_tiles, first_that_fits, with_maps_offloaded
from .margin import needed_bytes
from .plan import DecodeSettings, Plan, Stage, StagePrediction
from .planner import make_plan
from .predict import predict_decode

LEAST_TILE_PIXELS = 32
"""Smaller tiles would save nothing: what a layer holds beside its tile is more by then."""


def refit(plan: Plan, stage: Stage, free_bytes: int) -> Plan:
    """The same plan where the stage fits what is free now; else one made again for that.

    Raises:
        DoesNotFitError: nothing fits what is free now.
    """
    needed = needed_bytes(plan.prediction(stage), plan.device) + plan.budget.reserve_bytes
    if needed <= free_bytes:
        return plan
    return make_plan(plan.request, replace(plan.budget, free_bytes=free_bytes), plan.device)


def with_tile(plan: Plan, tile_pixels: int, overlap_pixels: int) -> Plan:
    """The plan with the user's tile for decode; 0 leaves it to the plan. What the layers pass on stays on the device as
    far as it fits.

    Raises:
        BadInputError: a tile that cannot be, or an overlap, which exact tiles do not have.
        DoesNotFitError: decode in such tiles does not fit the budget.
    """
    facts = family_of(plan.request.architecture).facts
    if overlap_pixels:
        raise BadInputError(
            f"an overlap of {overlap_pixels} pixels has no use: {facts.display_name} is decoded with no seams to blend",
            "set the overlap to 0",
        )
    if not tile_pixels:
        return plan
    if not family_of(plan.request.architecture).supports_tiling(plan.request.architecture):
        raise BadInputError(
            f"a tile of {tile_pixels} pixels is not possible: this model's autoencoder cannot be cut exactly",
            "set the tile size to 0",
        )
    if tile_pixels < LEAST_TILE_PIXELS:
        raise BadInputError(
            f"a tile of {tile_pixels} pixels is too small", f"use at least {LEAST_TILE_PIXELS} pixels, or 0"
        )
    whole = decode_in_tiles(plan.request, tile_pixels)
    ways = [replace(plan.decode, frames=pieces) for pieces in (whole, *with_maps_offloaded(whole))]
    found = first_that_fits(ways, lambda it: _predicted(plan, it), lambda it: _fits(plan, it))
    if found is None:
        needed = needed_bytes(_predicted(plan, ways[-1]), plan.device)
        raise DoesNotFitError(
            f"decode in tiles of {tile_pixels} pixels needs {format_gib(needed)}, and "
            f"{format_gib(plan.budget.usable_bytes)} can be used",
            "use a smaller tile, or 0 for the plan's own",
        )
    return replace(plan.with_prediction(found.prediction), decode=found.settings)


def _predicted(plan: Plan, settings: DecodeSettings) -> StagePrediction:
    return predict_decode(plan.request, settings, plan.sample.compute_dtype)


def _fits(plan: Plan, prediction: StagePrediction) -> bool:
    needed = needed_bytes(prediction, plan.device)
    return needed <= plan.budget.usable_bytes and plan.budget.host_allows(prediction.host_bytes)
