"""The next rung down: how a stage goes on when the device ran out of memory all the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

from ..units import format_gib
from .approximations import Approximation, approximations
from .autoencoder_candidates import decode_candidates, encode_candidates
from .denoiser_candidates import cheapest_sample
from .plan import DecodeSettings, EncodeSettings, Plan, SampleSettings, Stage, StagePrediction
from .planner import min_peak
from .predict import predict_decode, predict_encode
from .request import Request
from .suggestions import Suggestions, suggestions

_STEP = 0.875
"""A rung takes at most this share of the one above, where there is such: smaller steps would fail again and again."""


def next_fallback(plan: Plan, stage: Stage) -> Plan | None:
    """The plan with the fastest way to run the stage that takes less of the device; None where there is none."""
    peak_bytes = plan.prediction(stage).peak_bytes
    for most_bytes in (int(peak_bytes * _STEP), peak_bytes - 1):
        lower = _RUNGS[stage](plan, most_bytes)
        if lower is not None:
            return lower
    return None


def remedy(plan: Plan, stage: Stage) -> str:
    """What to do when there is no rung left."""
    if stage is Stage.DECODE:
        return "free device memory, or keep the latent with I2V Save Latent and decode it later"
    near = _nearest_below(plan, stage)
    sizes = [f"{near.shorter.frames} frames"] if near.shorter else []
    sizes += [f"{near.smaller.width_pixels}×{near.smaller.height_pixels}"] if near.smaller else []
    return "free device memory" + "".join(f", or use {size}" for size in sizes)


def _nearest_below(plan: Plan, stage: Stage) -> Suggestions:
    """The nearest requests whose thriftiest way takes less than what the stage has failed with."""
    failed_bytes = plan.prediction(stage).peak_bytes

    def fits(other: Request) -> bool:
        return min_peak(other, plan.device, plan.budget.host_free_bytes).peak_bytes < _STEP * failed_bytes

    return suggestions(
        plan.request,
        budget_bytes=failed_bytes,
        host_bytes=None,
        approximation=None,
        fits=fits,
    )


def what_changed(before: Plan, after: Plan, stage: Stage) -> str:
    """The difference between two rungs in words."""
    return ", ".join(_WORDS[stage](before, after)) or "smaller pieces"


def _lower_encode(plan: Plan, most_bytes: int) -> Plan | None:
    for way in chain(*encode_candidates(plan.request)):
        prediction = predict_encode(plan.request, way, plan.sample.compute_dtype)
        if _within(plan, prediction, most_bytes):
            return replace(plan.with_prediction(prediction), encode=way)
    return None


def _lower_sample(plan: Plan, most_bytes: int) -> Plan | None:
    """What the plan already gives up of exactness it keeps; more only where that is allowed."""
    own, allowed = Approximation.of(plan.sample), approximations(plan.request)
    for approximation in (own, *(allowed[allowed.index(own) + 1 :] if own in allowed else ())):
        found = cheapest_sample(
            plan.request,
            plan.sample.compute_dtype,
            lambda prediction: _within(plan, prediction, most_bytes),
            approximation,
        )
        if found is not None:
            lower = replace(plan.with_prediction(found.prediction), sample=found.settings)
            return replace(lower, chunk_size=found.prediction.chunk_size)
    return None


def _lower_decode(plan: Plan, most_bytes: int) -> Plan | None:
    for way in chain(*decode_candidates(plan.request)):
        prediction = predict_decode(plan.request, way, plan.sample.compute_dtype)
        if _within(plan, prediction, most_bytes):
            return replace(plan.with_prediction(prediction), decode=way)
    return None


_RUNGS: dict[Stage, Callable[[Plan, int], Plan | None]] = {
    Stage.ENCODE: _lower_encode,
    Stage.SAMPLE: _lower_sample,
    Stage.DECODE: _lower_decode,
}


def _within(plan: Plan, prediction: StagePrediction, most_bytes: int) -> bool:
    return prediction.peak_bytes <= most_bytes and plan.budget.host_allows(prediction.host_bytes)


def _sample_words(before: SampleSettings, after: SampleSettings) -> list[str]:
    words: list[str] = []
    if after.workspace_bytes != before.workspace_bytes and after.workspace_bytes is not None:
        words.append(f"pieces of {format_gib(after.workspace_bytes)}")
    if before.batched_guidance and not after.batched_guidance:
        words.append("guidance in two passes")
    words += ["streamed weights"] if after.streamed and not before.streamed else []
    words += ["parked skip connections"] if after.offload_skips and not before.offload_skips else []
    if Approximation.of(after) != Approximation.of(before):
        words.append(f"{Approximation.of(after)} (not exactly the same result)")
    return words


def _frame_words(before: EncodeSettings | DecodeSettings, after: EncodeSettings | DecodeSettings) -> list[str]:
    pieces = after.frames if isinstance(after, DecodeSettings) else after.picture
    words = [f"tiles of {pieces.tile_pixels} pixels"] if pieces.by_layer else [f"{pieces.chunk_size} frames at once"]
    words += ["streamed weights"] if after.streamed and not before.streamed else []
    words += ["maps in host memory"] if pieces.maps_bytes is not None else []
    return words


_WORDS: dict[Stage, Callable[[Plan, Plan], list[str]]] = {
    Stage.ENCODE: lambda before, after: _frame_words(before.encode, after.encode),
    Stage.SAMPLE: lambda before, after: _sample_words(before.sample, after.sample),
    Stage.DECODE: lambda before, after: _frame_words(before.decode, after.decode),
}
