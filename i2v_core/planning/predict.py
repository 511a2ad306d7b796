"""The peak of each stage, predicted by tracing the model's own code without weights."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch

from ..chunking import DistinctPieces, LayerCall
from ..families import Architecture, Family, VideoSize, Workload, family_of
from ..memory.trace import activation_bytes, skeleton, weights_bytes
from .plan import DecodeSettings, SamplePrediction, SampleSettings, Stage, StagePrediction
from .request import Request

# Copies of the latents in fp32 that the loop and the scheduler hold beside the denoiser's own tensors: the state, the
# model's input, two predictions, and two old outputs of a multistep scheduler.
_LATENT_COPIES = 6


@lru_cache(maxsize=64)
def predict_encode(request: Request, compute_dtype: torch.dtype) -> StagePrediction:
    """The encoders run one after another, so the stage's peak is that of the largest."""
    architecture = request.architecture
    family = family_of(architecture)
    predictions = [
        _predict(Stage.ENCODE, architecture, workload, component_dtype(architecture, workload.component, compute_dtype))
        for workload in family.encode_workloads(architecture, request.size)
    ]
    return max(predictions, key=lambda prediction: prediction.peak_bytes)


@lru_cache(maxsize=512)
def predict_sample(request: Request, settings: SampleSettings) -> SamplePrediction:
    architecture = request.architecture
    family = family_of(architecture)
    dtype = settings.compute_dtype
    branches = request.branches if settings.batched_guidance else 1
    module = skeleton(architecture, family.denoiser, dtype)
    workload = family.denoise_workload(architecture, request.size, branches)
    tracer = _ChunkTracer()
    with family.chunked(module, settings.chunk_settings, runner=tracer, on_chunk=lambda: None):
        denoise_bytes = activation_bytes(module, workload, dtype)
    return SamplePrediction(
        stage=Stage.SAMPLE,
        weights_bytes=weights_bytes(architecture, family.denoiser, dtype),
        activation_bytes=denoise_bytes + _LATENT_COPIES * _latent_bytes(family, request.size),
        chunk_size=min(tracer.frames_at_once // branches or 1, request.size.frames),
    )


class _ChunkTracer(DistinctPieces):
    """Traces one chunk of each shape, and remembers the smallest number of frames in one."""

    def __init__(self) -> None:
        self.frames_at_once = sys.maxsize

    def enter(self, call: LayerCall) -> AbstractContextManager[None]:
        if call.kind in ("resnet", "transformer"):
            self.frames_at_once = min(self.frames_at_once, call.chunk_size)
        return nullcontext()


@lru_cache(maxsize=512)
def predict_decode(request: Request, settings: DecodeSettings, compute_dtype: torch.dtype) -> StagePrediction:
    architecture = request.architecture
    family = family_of(architecture)
    workload = family.decode_workload(request.size, settings.chunk_size, settings.tile)
    dtype = component_dtype(architecture, family.decoder, compute_dtype)
    return _predict(Stage.DECODE, architecture, workload, dtype)


def component_dtype(architecture: Architecture, component: str, compute_dtype: torch.dtype) -> torch.dtype:
    """The plan's precision, but fp32 for a component whose own config asks for it."""
    fp32 = family_of(architecture).full_precision_components(architecture)
    return torch.float32 if component in fp32 else compute_dtype


def _predict(stage: Stage, architecture: Architecture, workload: Workload, dtype: torch.dtype) -> StagePrediction:
    module = skeleton(architecture, workload.component, dtype)
    return StagePrediction(
        stage=stage,
        weights_bytes=weights_bytes(architecture, workload.component, dtype),
        activation_bytes=activation_bytes(module, workload, dtype),
    )


def _latent_bytes(family: Family, size: VideoSize) -> int:
    elements = 1
    for side in family.facts.latent_size(size).shape_bcthw:
        elements *= side
    return elements * torch.float32.itemsize
