"""A plan as text for people, and as JSON for the page and for scripts."""

from __future__ import annotations

from typing import Any

from ..decoding import TilingSettings
from ..families import family_of
from ..placement.precision import AUTO
from ..placement.storage import WeightStorage
from ..units import format_gib
from .margin import expected_bytes, uncertainty_bytes
from .plan import Plan, Stage
from .request import Budget

_MODELS = {Stage.ENCODE: "encoders", Stage.SAMPLE: "denoiser", Stage.DECODE: "decoder"}


def report(plan: Plan) -> str:
    """The verdict, a table of the stages, and the reason for each choice."""
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
    return "\n".join([*lines, "", *(f"• {reason}" for reason in plan_reasons(plan))])


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """The plan for JSON, with its reasons."""
    size, sample = plan.request.size, plan.sample.settings
    encode_tiling, decode_tiling = plan.encode.settings.tiling, plan.decode.settings.tiling
    return {
        "model": plan.request.architecture.family,
        "width": size.width_pixels,
        "height": size.height_pixels,
        "frames": size.frames,
        "guidance": plan.request.guidance,
        "device": plan.device.name,
        "precision": plan.precision,
        "batched_guidance": sample.batched_guidance,
        "workspace_bytes": sample.workspace_bytes,
        "streamed": [stage.value for stage, it in plan.stages.items() if it.settings.streamed],
        "offload_skips": sample.offload_skips,
        "weight_storage": sample.weight_storage.value,
        "file_formats": list(plan.request.architecture.stored_formats),
        "context_length": sample.context.context_length if sample.context else None,
        "context_overlap": sample.context.context_overlap if sample.context else None,
        "chunk_size": plan.chunk_size,
        "encode_tile_size": encode_tiling.tile_pixels,
        "decode_chunk_size": decode_tiling.chunk_size,
        "tile_size": decode_tiling.tile_pixels,
        "maps_bytes": decode_tiling.maps_bytes,
        "usable_bytes": plan.budget.usable_bytes,
        "stages": [
            {
                "stage": prediction.stage.value,
                "weights_bytes": prediction.weights_bytes,
                "activation_bytes": prediction.activation_bytes,
                "peak_bytes": prediction.peak_bytes,
            }
            for prediction in plan.predictions
        ],
        "peak_bytes": plan.peak_bytes,
        "binding_stage": plan.binding_stage.stage.value,
        "reasons": list(plan_reasons(plan)),
    }


def plan_reasons(plan: Plan) -> tuple[str, ...]:
    """One sentence for each choice, from the budget to what stays unused."""
    return (
        _budget_reason(plan.budget),
        _precision_reason(plan),
        _guidance_reason(plan),
        _chunking_reason(plan),
        *_offload_reasons(plan),
        *_file_reasons(plan),
        *_approximation_reasons(plan),
        *_tiling_reasons(plan),
        *_memory_reasons(plan),
    )


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


def _precision_reason(plan: Plan) -> str:
    automatic = plan.request.precision == AUTO
    why = "the best that fits of what this device runs well" if automatic else "as requested"
    return f"precision is {plan.precision}: {why}"


def _guidance_reason(plan: Plan) -> str:
    if not plan.request.guidance:
        return "no guidance: one denoiser pass a step"
    if plan.sample.settings.batched_guidance:
        return "guidance takes both branches in one denoiser pass"
    return "guidance takes two denoiser passes a step, with half the activations of one"


def _chunking_reason(plan: Plan) -> str:
    workspace_bytes = plan.sample.settings.workspace_bytes
    if workspace_bytes is None:
        return "denoiser layers run unchunked: everything fits"
    latent_frames = family_of(plan.request.architecture).facts.latent_size(plan.request.size).latent_frames
    # A transformer's layers take tokens, whichever frames these belong to.
    at_once = f" ({plan.chunk_size} frames at once at full size)" if plan.chunk_size < latent_frames else ""
    return f"denoiser layers run in chunks of about {format_gib(workspace_bytes)}{at_once}, with the same result"


def _offload_reasons(plan: Plan) -> list[str]:
    streamed = [_MODELS[stage] for stage, it in plan.stages.items() if it.settings.streamed]
    reasons = [f"weights are streamed from host memory for: {', '.join(streamed)}"] if streamed else []
    if plan.sample.settings.offload_skips:
        reasons.append("skip connections wait in host memory")
    return reasons


def _file_reasons(plan: Plan) -> list[str]:
    formats = plan.request.architecture.stored_formats
    if not formats:
        return []
    return [
        f"{', '.join(formats)} weights: approximate, because of the file that was chosen; they are converted to "
        f"{plan.precision} for each layer"
    ]


def _approximation_reasons(plan: Plan) -> list[str]:
    sample, reasons = plan.sample.settings, list[str]()
    if sample.weight_storage is not WeightStorage.AS_COMPUTED:
        reasons.append(
            f"no exact settings fit, so the denoiser's weights are stored in {sample.weight_storage.value} and "
            f"converted to {plan.precision} for each layer: close to, but not exactly, the exact result"
        )
    if (context := sample.context) is not None:
        reasons.append(
            f"no exact settings fit, so the denoiser sees windows of {context.context_length} latent frames, blended "
            f"over the {context.context_overlap} they share: frames are close to, but not exactly, the exact ones, and "
            "movement may differ"
        )
    return reasons


def _tiling_reasons(plan: Plan) -> list[str]:
    encode, decode = plan.encode.settings.tiling, plan.decode.settings.tiling
    reasons = [f"the picture is encoded {_tiles(encode)}"] if encode.by_layer else []
    if not decode.by_layer:
        return [*reasons, f"decode takes {decode.chunk_size} of {plan.request.size.frames} frames at once"]
    frames = "one frame at a time" if decode.chunk_size == 1 else f"{decode.chunk_size} frames at once"
    return [*reasons, f"decode takes {frames}, {_tiles(decode)}"]


def _tiles(tiling: TilingSettings) -> str:
    kept = "" if tiling.maps_bytes is None else f", with {format_gib(tiling.maps_bytes)} of feature maps on the device"
    return f"layer by layer in tiles of {tiling.tile_pixels}×{tiling.tile_pixels} pixels{kept}, with the same result"


def _memory_reasons(plan: Plan) -> list[str]:
    host_free_bytes, reasons = plan.budget.host_free_bytes, list[str]()
    if host_free_bytes is not None:
        reasons.append(f"{format_gib(plan.host_bytes)} of {format_gib(host_free_bytes)} of host memory is used")
    unused_bytes = plan.budget.usable_bytes - plan.peak_bytes
    return [*reasons, f"{format_gib(unused_bytes)} stays unused"]
