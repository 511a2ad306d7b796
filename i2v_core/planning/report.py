"""A plan in words and as a table."""

from __future__ import annotations

from collections.abc import Sequence

from ..decoding import TilingSettings
from ..families import family_of
from ..placement.precision import AUTO, precision_name
from ..placement.storage import WeightStorage
from ..units import format_gib
from .margin import expected_bytes, uncertainty_bytes
from .plan import DecodeSettings, EncodeSettings, Plan, SampleSettings, StagePrediction
from .request import Budget, Request


def report(plan: Plan) -> str:
    """What a person wants to read: the verdict, the stages, and why each choice was made."""
    request, binding = plan.request, plan.binding_stage
    name = family_of(request.architecture).facts.display_name
    lines = [
        f"{name} {request.size} fits: {format_gib(expected_bytes(binding, plan.device))} ± "
        f"{format_gib(uncertainty_bytes(binding, plan.device))} of {format_gib(plan.budget.usable_bytes)}"
        f" on {plan.device.name}, decided by {binding.stage.value}",
        "",
        f"{'stage':<8} {'weights':>11} {'activations':>12} {'peak':>11}",
    ]
    lines += [
        f"{it.stage.value:<8} {format_gib(it.weights_bytes):>11} {format_gib(it.activation_bytes):>12} "
        f"{format_gib(it.peak_bytes):>11}"
        for it in plan.predictions
    ]
    return "\n".join([*lines, "", *(f"• {reason}" for reason in plan.reasons)])


def plan_reasons(
    request: Request,
    budget: Budget,
    encode: EncodeSettings,
    sample: SampleSettings,
    decode: DecodeSettings,
    chunk_size: int,
    stages: Sequence[StagePrediction],
) -> tuple[str, ...]:
    reasons = [_budget_reason(budget), _precision_reason(request, sample), _guidance_reason(request, sample)]
    if sample.workspace_bytes is None:
        reasons.append("denoiser layers run whole: everything fits")
    else:
        latent_frames = family_of(request.architecture).facts.latent_size(request.size).latent_frames
        # A transformer's layers take tokens, whichever frames these are of.
        at_once = f" ({chunk_size} frames at once at full size)" if chunk_size < latent_frames else ""
        pieces = f"denoiser layers run in pieces of about {format_gib(sample.workspace_bytes)}{at_once}"
        reasons.append(f"{pieces}, with the same result")
    streamed = [name for name, it in (("encoders", encode), ("denoiser", sample), ("decoder", decode)) if it.streamed]
    if streamed:
        reasons.append(f"weights come from host memory layer by layer for: {', '.join(streamed)}")
    if sample.offload_skips:
        reasons.append("skip connections wait in host memory")
    reasons += [*_file_reasons(request, sample), *_approximation_reasons(sample)]
    if encode.picture.by_layer:
        reasons.append(f"the picture is encoded {_tiled(encode.picture)}")
    if decode.frames.by_layer:
        frames = "a frame at a time" if decode.frames.chunk_size == 1 else f"{decode.frames.chunk_size} frames at once"
        reasons.append(f"decode takes {frames}, {_tiled(decode.frames)}")
    else:
        reasons.append(f"decode takes {decode.frames.chunk_size} of {request.size.frames} frames at once")
    if budget.host_free_bytes is not None:
        host_bytes = max(stage.host_bytes for stage in stages)
        reasons.append(f"of host memory {format_gib(host_bytes)} of {format_gib(budget.host_free_bytes)} is taken")
    unused_bytes = budget.usable_bytes - max(stage.peak_bytes for stage in stages)
    reasons.append(f"{format_gib(unused_bytes)} stays unused")
    return tuple(reasons)


def _budget_reason(budget: Budget) -> str:
    reserve = f", less a reserve of {format_gib(budget.reserve_bytes)}" if budget.reserve_bytes else ""
    if budget.limit_bytes is None:
        return f"the budget is what is free now, {format_gib(budget.free_bytes)}{reserve}"
    if budget.limit_bytes > budget.free_bytes:
        return (
            f"the budget of {format_gib(budget.limit_bytes)} is more than is free: "
            f"planned for {format_gib(budget.free_bytes)}{reserve}"
        )
    return f"the budget is {format_gib(budget.limit_bytes)}{reserve}"


def _precision_reason(request: Request, sample: SampleSettings) -> str:
    chosen = precision_name(sample.compute_dtype)
    why = "the best of what this device runs well that fits" if request.precision == AUTO else "as asked"
    return f"precision is {chosen}: {why}"


def _guidance_reason(request: Request, sample: SampleSettings) -> str:
    if not request.guidance:
        return "no guidance: one denoiser pass a step"
    if sample.batched_guidance:
        return "guidance takes both branches in one denoiser pass"
    return "guidance takes two denoiser passes a step, with half the activations of one"


def _file_reasons(request: Request, sample: SampleSettings) -> list[str]:
    formats = request.architecture.stored_formats
    if not formats:
        return []
    return [
        f"{', '.join(formats)} weights: approximate, by the file that was chosen; they come to "
        f"{precision_name(sample.compute_dtype)} for each layer"
    ]


def _approximation_reasons(sample: SampleSettings) -> list[str]:
    reasons: list[str] = []
    if sample.weight_storage is not WeightStorage.AS_COMPUTED:
        reasons.append(
            f"no exact way fits, so the denoiser's weights lie in {sample.weight_storage.value} and come to "
            f"{precision_name(sample.compute_dtype)} for each layer: close to, but not exactly, the exact result"
        )
    if (context := sample.context) is not None:
        reasons.append(
            f"no exact way fits, so the denoiser sees windows of {context.context_length} latent frames, blended where "
            f"they share {context.context_overlap}: frames are close to, but not exactly, the exact ones, and movement "
            "may differ"
        )
    return reasons


def _tiled(pieces: TilingSettings) -> str:
    where = "" if pieces.maps_bytes is None else f", of which {format_gib(pieces.maps_bytes)} stay on the device"
    return f"layer by layer in tiles of {pieces.tile_pixels} pixels squared{where}, with the same result"
