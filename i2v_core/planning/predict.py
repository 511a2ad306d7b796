"""The peak of each stage, predicted by tracing the model's own code without weights."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod

import torch
from torch import nn

from ..decoding import ONE_WHOLE_FRAME
from ..families import Architecture, VideoSize, Workload, family_of
from ..placement.storage import WeightStorage
from .plan import DecodeSettings, EncodeSettings, SamplePrediction, SampleSettings, Stage, StagePrediction
from .request import Request
from .trace import activation_bytes, skeleton, streamed_bytes, trace_bands, trace_denoiser, weights_bytes
from .weights import highest_moment, module_weights

# Copies of the latents in fp32 that the loop and the scheduler hold beside the denoiser's own tensors: the state, the
# model's input, two predictions, and two old outputs of a multistep scheduler.
_LATENT_COPIES = 6


def predict_encode(request: Request, settings: EncodeSettings, compute_dtype: torch.dtype) -> StagePrediction:
    """The encoders run one after another, so the stage's peak is that of the largest."""
    architecture = request.architecture
    family = family_of(architecture)
    predictions = [
        _predict_encoder(
            architecture,
            # What does not depend on the size is predicted once for all sizes.
            request.size if workload.depends_on_size else family.facts.default_size,
            request.guidance,
            workload.name,
            # What does not depend on the pieces is predicted once for all pieces.
            settings if workload.by_layer else replace(settings, picture=ONE_WHOLE_FRAME),
            compute_dtype,
        )
        for workload in family.encode_workloads(architecture, request.size, request.guidance, settings.picture)
    ]
    largest = max(predictions, key=lambda prediction: prediction.peak_bytes)
    return replace(largest, host_bytes=max(prediction.host_bytes for prediction in predictions))


@lru_cache(maxsize=512)
def _predict_encoder(
    architecture: Architecture,
    size: VideoSize,
    guidance: bool,
    name: str,
    settings: EncodeSettings,
    compute_dtype: torch.dtype,
) -> StagePrediction:
    workloads = family_of(architecture).encode_workloads(architecture, size, guidance, settings.picture)
    workload = next(workload for workload in workloads if workload.name == name)
    return _predict(Stage.ENCODE, architecture, workload, compute_dtype, streamed=settings.streamed)


def predict_sample(request: Request, settings: SampleSettings) -> SamplePrediction:
    """The denoiser's layer calls decide: with all its weights in place, or with those of a call and of the next.

    Of several denoisers, which run one after another, that which takes most.
    """
    denoisers = family_of(request.architecture).denoisers(request.architecture)
    predictions = [_predict_denoiser(request, settings, it.component) for it in denoisers]
    most = max(predictions, key=lambda prediction: prediction.peak_bytes)
    return replace(most, host_bytes=max(it.host_bytes for it in predictions))


def _predict_denoiser(request: Request, settings: SampleSettings, component: str) -> SamplePrediction:
    architecture = request.architecture
    family = family_of(architecture)
    facts, latent = family.facts, family.facts.latent_size(request.size)
    branches = request.branches if settings.batched_guidance else 1
    windows = 1 if settings.context is None else settings.context.count(latent.latent_frames, facts.anchor_frames)
    seen_frames = latent.latent_frames if settings.context is None or windows == 1 else settings.context.context_length
    size = replace(request.size, frames=facts.pixel_frames(seen_frames))
    trace = trace_denoiser(architecture, size, branches, settings.compute_dtype, settings.chunk_settings, component)
    calls = trace.calls
    weights = module_weights(trace.module, settings.weight_storage, tuple(call.modules for call in calls))
    highest = highest_moment(calls, weights, streamed=settings.streamed)
    latent_bytes = prod(latent.shape_bcthw) * torch.float32.itemsize
    # Beside a window's own inputs there are those of the clip, and the blended prediction.
    blending_bytes = (request.branches + branches) * latent_bytes if windows > 1 else 0
    frames_at_once = [call.chunk_size // branches for call in calls if call.unit == "frame"]
    return SamplePrediction(
        stage=Stage.SAMPLE,
        weights_bytes=highest.weights_bytes,
        activation_bytes=highest.activation_bytes + _LATENT_COPIES * latent_bytes + blending_bytes,
        host_bytes=trace.parked_bytes + (weights.lying_bytes if settings.streamed else 0),
        chunk_size=max(1, min(frames_at_once, default=latent.latent_frames)),
        layer_calls=sum(call.pieces for call in calls) * (request.branches // branches) * windows,
        layers=len(calls),
    )


def predict_decode(request: Request, settings: DecodeSettings, compute_dtype: torch.dtype) -> StagePrediction:
    prediction = _predict_decoder(request.architecture, request.size, settings, compute_dtype)
    size = request.size
    frames_bytes = 3 * size.frames * size.height_pixels * size.width_pixels * torch.float32.itemsize
    return replace(prediction, host_bytes=prediction.host_bytes + frames_bytes)


@lru_cache(maxsize=512)
def _predict_decoder(
    architecture: Architecture, size: VideoSize, settings: DecodeSettings, compute_dtype: torch.dtype
) -> StagePrediction:
    workload = family_of(architecture).decode_workload(size, settings.frames)
    return _predict(Stage.DECODE, architecture, workload, compute_dtype, streamed=settings.streamed)


def component_dtype(
    architecture: Architecture, component: str, compute_dtype: torch.dtype, stage: Stage
) -> torch.dtype:
    """The plan's precision, but fp32 for a component whose own config asks for it, and bf16 for fp16 where numbers are
    too large for that.
    """
    family = family_of(architecture)
    if component in family.full_precision_components(architecture, decoding=stage is Stage.DECODE):
        return torch.float32
    too_large = compute_dtype is torch.float16 and component in family.facts.beyond_fp16
    return torch.bfloat16 if too_large else compute_dtype


def _predict(
    stage: Stage, architecture: Architecture, workload: Workload, compute_dtype: torch.dtype, *, streamed: bool
) -> StagePrediction:
    dtype = component_dtype(architecture, workload.component, compute_dtype, stage)
    module = skeleton(architecture, workload.component, dtype)
    if workload.by_layer:
        return _predict_by_layer(stage, module, workload, dtype, streamed=streamed)
    all_bytes = weights_bytes(architecture, workload.component, dtype)
    return StagePrediction(
        stage=stage,
        weights_bytes=streamed_bytes(architecture, workload.component, dtype, workload.passes, workload.read_in_place)
        if streamed
        else all_bytes,
        activation_bytes=activation_bytes(module, workload, dtype),
        host_bytes=all_bytes if streamed else 0,
    )


def _predict_by_layer(
    stage: Stage, module: nn.Module, workload: Workload, dtype: torch.dtype, *, streamed: bool
) -> StagePrediction:
    trace = trace_bands(module, workload, dtype)
    weights = module_weights(module, WeightStorage.AS_COMPUTED, tuple(call.modules for call in trace.calls))
    highest = highest_moment(trace.calls, weights, streamed=streamed, passes=workload.passes)
    return StagePrediction(
        stage=stage,
        weights_bytes=highest.weights_bytes,
        activation_bytes=highest.activation_bytes,
        host_bytes=trace.parked_bytes + (weights.lying_bytes if streamed else 0),
    )
