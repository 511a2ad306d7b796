"""Changing a plan after it was made: for less free memory, or for a tile size that the user sets."""

from __future__ import annotations

from ..errors import BadInputError, DoesNotFitError
from ..families import family_of
from ..memory.device_memory import DeviceMemory
from ..units import format_gib
from .candidates import tiled_decode_candidates
from .fit_limit import FitLimit
from .margin import needed_bytes
from .plan import DecodeSettings, Plan, Stage, StagePrediction
from .planner import make_plan
from .predict import predict_decode
from .request import Budget
from .search import first_that_fits

MIN_TILE_PIXELS = 32
"""Smaller tiles would save nothing: what a layer holds beside its tile is larger by then."""


def refit(plan: Plan, stage: Stage, memory: DeviceMemory) -> Plan:
    """The same plan where the stage fits the device's memory as it is now; else a new one for that.

    Raises:
        DoesNotFitError: no plan fits.
    """
    if needed_bytes(plan.prediction(stage), plan.device) <= memory.usable_bytes:
        return plan
    return make_plan(plan.request, Budget.of(memory, plan.budget.host_free_bytes), plan.device)


def with_tile(plan: Plan, tile_pixels: int, overlap_pixels: int) -> Plan:
    """The plan with the user's tile size for decode; 0 keeps the plan's own. Feature maps stay on the device as far as
    they fit.

    Raises:
        BadInputError: a tile that is not possible, or an overlap, which exact tiles do not have.
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
            f"a tile of {tile_pixels} pixels is not possible: this model's autoencoder cannot be tiled exactly",
            "set the tile size to 0",
        )
    if tile_pixels < MIN_TILE_PIXELS:
        raise BadInputError(
            f"a tile of {tile_pixels} pixels is too small", f"use at least {MIN_TILE_PIXELS} pixels, or 0"
        )

    def predict(settings: DecodeSettings) -> StagePrediction:
        return predict_decode(plan.request, settings, plan.compute_dtype)

    candidates = tiled_decode_candidates(plan.decode.settings, plan.request, tile_pixels)
    found = first_that_fits(candidates, predict, FitLimit.of(plan.budget, plan.device))
    if found is None:
        needed = needed_bytes(predict(candidates[-1]), plan.device)
        raise DoesNotFitError(
            f"decode in tiles of {tile_pixels} pixels needs {format_gib(needed)}, and "
            f"{format_gib(plan.budget.usable_bytes)} can be used",
            "use a smaller tile, or 0 for the plan's own",
        )
    return plan.with_stage(found)
