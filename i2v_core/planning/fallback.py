"""The fallback after an out-of-memory: the stage goes on with settings that need less of the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..units import format_gib
from .approximations import Approximation, approximations
from .fit_limit import FitLimit
from .plan import AnyStagePlan, DecodePlan, EncodePlan, Plan, SamplePlan, SampleSettings, Stage
from .search import cheapest_sample, first_decode, first_encode
from .suggestions import suggestions

_STEP = 0.875
"""A fallback needs at most this share of what has failed, where there is such: smaller steps would fail again."""


def next_fallback(plan: Plan, stage: Stage) -> Plan | None:
    """The plan with the fastest settings for the stage that need less of the device; None where there are none."""
    peak_bytes = plan.prediction(stage).peak_bytes
    for most_bytes in (int(peak_bytes * _STEP), peak_bytes - 1):
        lower = _LOWER[stage](plan, _limit(plan, most_bytes))
        if lower is not None:
            return plan.with_stage(lower)
    return None


def remedy(plan: Plan, stage: Stage) -> str:
    """Advice for the user where there is no fallback left."""
    if stage is Stage.DECODE:
        return "free device memory, or keep the latent with I2V Save Latent and decode it later"
    failed_bytes = plan.prediction(stage).peak_bytes
    limit = _limit(plan, int(failed_bytes * _STEP))
    suggested = suggestions(plan.request, plan.device, limit, budget_bytes=failed_bytes)
    sizes = [f"{suggested.shorter.frames} frames"] if suggested.shorter else []
    sizes += [f"{suggested.smaller.width_pixels}×{suggested.smaller.height_pixels}"] if suggested.smaller else []
    return "free device memory" + "".join(f", or use {size}" for size in sizes)


def what_changed(before: Plan, after: Plan, stage: Stage) -> str:
    """The difference between a plan and its fallback, in words."""
    return ", ".join(_CHANGES[stage](before, after)) or "smaller chunks"


def _limit(plan: Plan, most_bytes: int) -> FitLimit:
    """Limit on bare predictions: that of the failed settings was too low, by whatever margin."""
    return FitLimit(device_bytes=most_bytes, host_bytes=plan.budget.host_free_bytes)


def _lower_encode(plan: Plan, limit: FitLimit) -> EncodePlan | None:
    return first_encode(plan.request, plan.compute_dtype, limit)


def _lower_sample(plan: Plan, limit: FitLimit) -> SamplePlan | None:
    """Keeps the approximation that the plan has; goes to a stronger one only where the request allows it."""
    own, allowed = Approximation.of(plan.sample.settings), approximations(plan.request)
    stronger: Sequence[Approximation] = allowed[allowed.index(own) + 1 :] if own in allowed else ()
    found = (cheapest_sample(plan.request, plan.compute_dtype, limit, it) for it in (own, *stronger))
    return next((it for it in found if it is not None), None)


def _lower_decode(plan: Plan, limit: FitLimit) -> DecodePlan | None:
    return first_decode(plan.request, plan.compute_dtype, limit)


_LOWER: dict[Stage, Callable[[Plan, FitLimit], AnyStagePlan | None]] = {
    Stage.ENCODE: _lower_encode,
    Stage.SAMPLE: _lower_sample,
    Stage.DECODE: _lower_decode,
}


def _sample_changes(before: SampleSettings, after: SampleSettings) -> list[str]:
    changes: list[str] = []
    if after.workspace_bytes != before.workspace_bytes and after.workspace_bytes is not None:
        changes.append(f"chunks of {format_gib(after.workspace_bytes)}")
    if before.batched_guidance and not after.batched_guidance:
        changes.append("guidance in two passes")
    changes += ["streamed weights"] if after.streamed and not before.streamed else []
    changes += ["offloaded skip connections"] if after.offload_skips and not before.offload_skips else []
    if Approximation.of(after) != Approximation.of(before):
        changes.append(f"{Approximation.of(after)} (not exactly the same result)")
    return changes


def _autoencoder_changes(before: EncodePlan | DecodePlan, after: EncodePlan | DecodePlan) -> list[str]:
    tiling = after.settings.tiling
    changes = [f"tiles of {tiling.tile_pixels} pixels" if tiling.by_layer else f"{tiling.chunk_size} frames at once"]
    changes += ["streamed weights"] if after.settings.streamed and not before.settings.streamed else []
    changes += ["feature maps in host memory"] if tiling.maps_bytes is not None else []
    return changes


_CHANGES: dict[Stage, Callable[[Plan, Plan], list[str]]] = {
    Stage.ENCODE: lambda before, after: _autoencoder_changes(before.encode, after.encode),
    Stage.SAMPLE: lambda before, after: _sample_changes(before.sample.settings, after.sample.settings),
    Stage.DECODE: lambda before, after: _autoencoder_changes(before.decode, after.decode),
}
