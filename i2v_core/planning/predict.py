"""Predictions of each stage's peak, made by tracing the model's own code without weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import torch

from ..decoding import ONE_FRAME_UNTILED, TilingSettings
from ..families import Architecture, VideoSize, Workload, family_of
from ..placement.storage import WeightStorage
from .plan import (
    DecodeSettings,
    EncodeSettings,
    Plan,
    SamplePrediction,
    SampleSettings,
    Stage,
    StagePlan,
    StagePrediction,
)
from .request import Request
from .trace import (
    TraceTemplate,
    activation_bytes,
    autoencoder_template,
    skeleton,
    streamed_bytes,
    trace_denoiser,
    weights_bytes,
)
from .weights import module_weights, peak_usage

# Copies of the latents in fp32 that the loop and the scheduler hold beside the denoiser's own tensors: the state, the
# denoiser's input, the other branch's prediction. A multistep scheduler also holds the state before and two old
# outputs (such schedulers do not scale the input, which then is the state).
_LATENT_COPIES, _MULTISTEP_COPIES = 3, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """Names a family's workload, as a key for caches: workloads themselves are functions, which never compare equal."""

    stage: Stage
    name: str
    architecture: Architecture
    size: VideoSize
    guidance: bool
    tiling: TilingSettings

    @property
    def workload(self) -> Workload:
        family = family_of(self.architecture)
        if self.stage is Stage.DECODE:
            return family.decode_workload(self.size, self.tiling)
        workloads = family.encode_workloads(self.architecture, self.size, self.guidance, self.tiling)
        return next(workload for workload in workloads if workload.name == self.name)


def predict_encode(
    request: Request, settings: EncodeSettings, compute_dtype: torch.dtype, *, of_any_size: bool = False
) -> StagePrediction:
    """Predict encode: its encoders run one after another, so its peak is that of the largest.

    `of_any_size` leaves out encoders whose peak depends on the video's size. That needs no trace for a new size.
    """
    architecture = request.architecture
    family = family_of(architecture)
    predictions = [
        _predict(
            _Work(
                stage=Stage.ENCODE,
                name=workload.name,
                architecture=architecture,
                # One prediction does for all sizes where these do not matter.
                size=request.size if workload.depends_on_size else family.facts.default_size,
                guidance=request.guidance,
                # Likewise for all tilings.
                tiling=settings.tiling if workload.by_layer else ONE_FRAME_UNTILED,
            ),
            compute_dtype,
            streamed=settings.streamed,
        )
        for workload in family.encode_workloads(architecture, request.size, request.guidance, settings.tiling)
        if not (of_any_size and workload.depends_on_size)
    ]
    no_encoder = StagePrediction(stage=Stage.ENCODE, weights_bytes=0, activation_bytes=0)
    largest = max(predictions, key=lambda prediction: prediction.peak_bytes, default=no_encoder)
    return replace(largest, host_bytes=max((prediction.host_bytes for prediction in predictions), default=0))


def predict_sample(request: Request, settings: SampleSettings) -> SamplePrediction:
    """Predict sampling: several denoisers run one after another, so its peak is that of the largest."""
    predictions = [_predict_denoiser(request, settings, it) for it in _distinct_denoisers(request.architecture)]
    largest = max(predictions, key=lambda prediction: prediction.peak_bytes)
    return replace(largest, host_bytes=max(it.host_bytes for it in predictions))


@lru_cache(maxsize=64)
def _distinct_denoisers(architecture: Architecture) -> tuple[str, ...]:
    """Names of the denoisers, one of each kind: those of equal config and stored format need equal memory."""
    configs, stored = dict(architecture.configs), architecture.stored
    distinct: dict[object, str] = {}
    for denoiser in family_of(architecture).denoisers(architecture):
        name = denoiser.component
        distinct.setdefault((configs[name], repr(stored.get(name))), name)
    return tuple(distinct.values())


def _predict_denoiser(request: Request, settings: SampleSettings, component: str) -> SamplePrediction:
    """The layer call with the highest peak decides: with all weights on the device, or streamed with its own and those
    of the next call.
    """
    architecture = request.architecture
    family = family_of(architecture)
    facts, latent = family.facts, family.facts.latent_size(request.size)
    branches = request.branches if settings.batched_guidance else 1
    windows = 1 if settings.context is None else settings.context.count(latent.latent_frames, facts.anchor_frames)
    seen_frames = latent.latent_frames if settings.context is None or windows == 1 else settings.context.context_length
    size = replace(request.size, frames=facts.pixel_frames(seen_frames))
    rows = branches * request.clips
    trace = trace_denoiser(architecture, size, rows, settings.compute_dtype, settings.chunk_settings, component)
    calls = trace.calls
    weights = module_weights(trace.module, settings.weight_storage, tuple(call.modules for call in calls))
    highest = peak_usage(calls, weights, streamed=settings.streamed)
    latent_bytes = request.clips * prod(latent.shape_bcthw) * torch.float32.itemsize
    multistep = any("Multistep" in choice.diffusers_class for choice in facts.schedulers)
    kept_bytes = (_MULTISTEP_COPIES if multistep else _LATENT_COPIES) * latent_bytes
    if multistep and settings.compute_dtype is torch.float32 and request.clips == windows == 1:
        kept_bytes -= latent_bytes  # the traced input is the state itself
    # Beside a window's own inputs, those of the whole clip and the blended prediction are held.
    blending_bytes = (request.branches + branches) * latent_bytes if windows > 1 else 0
    passes = request.branches // branches
    # The inputs of the other pass stay on the device.
    waiting_bytes = (passes - 1) * calls[0].before_bytes
    frames_at_once = [call.chunk_size // rows for call in calls if call.unit == "frame"]
    return SamplePrediction(
        stage=Stage.SAMPLE,
        weights_bytes=highest.weights_bytes,
        activation_bytes=highest.activation_bytes + kept_bytes + blending_bytes + waiting_bytes,
        host_bytes=trace.offloaded_bytes + (weights.stored_bytes if settings.streamed else 0),
        chunk_size=max(1, min(frames_at_once, default=latent.latent_frames)),
        layer_calls=sum(call.chunks for call in calls) * passes * windows,
        layers=len(calls),
    )


def predict_decode(request: Request, settings: DecodeSettings, compute_dtype: torch.dtype) -> StagePrediction:
    """Predict decode, whose finished frames are collected in host memory."""
    size = request.size
    work = _Work(
        stage=Stage.DECODE,
        name="decode",
        architecture=request.architecture,
        size=size,
        guidance=request.guidance,
        tiling=settings.tiling,
    )
    prediction = _predict(work, compute_dtype, streamed=settings.streamed)
    frames_bytes = 3 * size.frames * size.height_pixels * size.width_pixels * torch.float32.itemsize
    return replace(prediction, host_bytes=prediction.host_bytes + frames_bytes)


def with_settings(
    plan: Plan,
    *,
    encode: EncodeSettings | None = None,
    sample: SampleSettings | None = None,
    decode: DecodeSettings | None = None,
) -> Plan:
    """The plan with these settings, and with predictions for them in all stages.

        with_settings(plan, sample=replace(plan.sample.settings, streamed=True))

    Whether they fit the budget is not checked.
    """
    encode = plan.encode.settings if encode is None else encode
    sample = plan.sample.settings if sample is None else sample
    decode = plan.decode.settings if decode is None else decode
    request, dtype = plan.request, sample.compute_dtype
    return replace(
        plan,
        encode=StagePlan(encode, predict_encode(request, encode, dtype)),
        sample=StagePlan(sample, predict_sample(request, sample)),
        decode=StagePlan(decode, predict_decode(request, decode, dtype)),
    )


def component_dtype(
    architecture: Architecture, component: str, compute_dtype: torch.dtype, stage: Stage
) -> torch.dtype:
    """The plan's precision; but fp32 for components whose config requires it, and bf16 in place of fp16 for those whose
    values exceed fp16's range.
    """
    family = family_of(architecture)
    if component in family.full_precision_components(architecture, decoding=stage is Stage.DECODE):
        return torch.float32
    overflows = compute_dtype is torch.float16 and component in family.facts.fp16_unsafe
    return torch.bfloat16 if overflows else compute_dtype


@lru_cache(maxsize=1024)
def _predict(work: _Work, compute_dtype: torch.dtype, *, streamed: bool) -> StagePrediction:
    workload, architecture = work.workload, work.architecture
    dtype = component_dtype(architecture, workload.component, compute_dtype, work.stage)
    if workload.by_layer:
        return _predict_by_layer(work, workload.passes, dtype, streamed=streamed)
    all_bytes = weights_bytes(architecture, workload.component, dtype)
    return StagePrediction(
        stage=work.stage,
        weights_bytes=streamed_bytes(architecture, workload.component, dtype, workload.passes, workload.read_in_place)
        if streamed
        else all_bytes,
        activation_bytes=_own_forward_bytes(work, dtype),
        host_bytes=all_bytes if streamed else 0,
    )


def _predict_by_layer(work: _Work, passes: int, dtype: torch.dtype, *, streamed: bool) -> StagePrediction:
    # A tile's workspace is proportional to its pixels, so one trace in tiles of one pixel does for all tiles.
    smallest = replace(work, tiling=replace(work.tiling, tile_pixels=1))
    trace = _autoencoder_template(smallest, dtype).for_workspace(work.tiling.tile_pixels**2)
    weights = module_weights(trace.module, WeightStorage.AS_COMPUTED, tuple(call.modules for call in trace.calls))
    highest = peak_usage(trace.calls, weights, streamed=streamed, passes=passes)
    return StagePrediction(
        stage=work.stage,
        weights_bytes=highest.weights_bytes,
        activation_bytes=highest.activation_bytes,
        host_bytes=trace.offloaded_bytes + (weights.stored_bytes if streamed else 0),
    )


@lru_cache(maxsize=256)
def _autoencoder_template(work: _Work, dtype: torch.dtype) -> TraceTemplate:
    workload = work.workload
    return autoencoder_template(skeleton(work.architecture, workload.component, dtype), workload, dtype)


@lru_cache(maxsize=256)
def _own_forward_bytes(work: _Work, dtype: torch.dtype) -> int:
    workload = work.workload
    return activation_bytes(skeleton(work.architecture, workload.component, dtype), workload, dtype)
