"""A plan: every choice made for one request, with the predicted peak of every stage and the reasons."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch

from ..chunking import ChunkSettings
from ..decoding import ONE_FRAME_UNTILED, TilingSettings
from ..errors import PlanMismatchError
from ..families import Architecture
from ..memory.device import DeviceFacts
from ..placement.precision import precision_name
from ..placement.storage import WeightStorage
from ..sampling.context import ContextWindows
from .request import Budget, Request


class Stage(str, Enum):
    """The stages of a run, in their order. One stage's weights are on the device at a time."""

    ENCODE = "encode"
    SAMPLE = "sample"
    DECODE = "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePrediction:
    """What a stage takes on the device at its peak: the weights in place then, and live tensors.

    `host_bytes` is what it takes of host memory beside the loaded model: weights made ready to stream, parked skip
    connections, finished frames.
    """

    stage: Stage
    weights_bytes: int
    activation_bytes: int
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        return self.weights_bytes + self.activation_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePrediction(StagePrediction):
    """`chunk_size` is the fewest frames, of one clip, that a per-frame layer takes at once; `layer_calls` counts the
    pieces of all layers in one step, `layers` the layers.
    """

    chunk_size: int = 1
    layer_calls: int = 1
    layers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeSettings:
    """How the encoders run.

    `streamed`: their weights come in leaf by leaf, or layer by layer where `picture` has tiles. `picture`: how the
    autoencoder takes the picture.
    """

    streamed: bool = False
    picture: TilingSettings = ONE_FRAME_UNTILED


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSettings:
    """How the denoiser runs.

    `workspace_bytes` None: layers run whole; else no layer call takes more than that. `streamed`: weights come in
    layer by layer. `offload_skips`: skip connections wait in host memory. `weight_storage`: what the weights lie in, on
    the device or where they stream from, between the calls of their layer; in 8 bits the result is approximate.
    `context`: the denoiser sees windows of the clip, which is approximate too; None: all of it.
    """

    compute_dtype: torch.dtype
    batched_guidance: bool
    workspace_bytes: int | None = None
    streamed: bool = False
    offload_skips: bool = False
    weight_storage: WeightStorage = WeightStorage.AS_COMPUTED
    context: ContextWindows | None = None

    @property
    def chunk_settings(self) -> ChunkSettings:
        workspace_bytes = sys.maxsize if self.workspace_bytes is None else self.workspace_bytes
        return ChunkSettings(workspace_bytes=workspace_bytes, offload_skips=self.offload_skips)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings:
    """How latents become frames. `streamed`: weights come in leaf by leaf, or layer by layer where there are tiles."""

    frames: TilingSettings
    streamed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The fastest way found to make the request within the budget.

    `chunk_size` is the number of frames that the denoiser's largest per-frame layer takes at once.
    """

    request: Request
    device: DeviceFacts
    budget: Budget
    encode: EncodeSettings
    sample: SampleSettings
    decode: DecodeSettings
    chunk_size: int
    predictions: tuple[StagePrediction, ...]
    reasons: tuple[str, ...]

    def prediction(self, stage: Stage) -> StagePrediction:
        return next(prediction for prediction in self.predictions if prediction.stage is stage)

    def with_prediction(self, prediction: StagePrediction) -> Plan:
        """The plan with another prediction for its stage."""
        return replace(
            self, predictions=tuple(prediction if it.stage is prediction.stage else it for it in self.predictions)
        )

    @property
    def binding_stage(self) -> StagePrediction:
        """The stage with the highest peak: the one that decides what fits."""
        return max(self.predictions, key=lambda prediction: prediction.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.binding_stage.peak_bytes

    @property
    def precision(self) -> str:
        return precision_name(self.sample.compute_dtype)

    def check_made_for(self, architecture: Architecture) -> None:
        """Raise `PlanMismatchError` unless the plan was made for a model of this architecture."""
        if self.request.architecture != architecture:
            raise PlanMismatchError(
                "the plan was made for another model", "connect the same I2V Loader to VRAM Budget and to this node"
            )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what a page or a script wants to know of the plan."""
        size = self.request.size
        return {
            "model": self.request.architecture.family,
            "width": size.width_pixels,
            "height": size.height_pixels,
            "frames": size.frames,
            "guidance": self.request.guidance,
            "device": self.device.name,
            "precision": self.precision,
            "batched_guidance": self.sample.batched_guidance,
            "workspace_bytes": self.sample.workspace_bytes,
            "streamed": [
                stage.value
                for stage, settings in (
                    (Stage.ENCODE, self.encode),
                    (Stage.SAMPLE, self.sample),
                    (Stage.DECODE, self.decode),
                )
                if settings.streamed
            ],
            "offload_skips": self.sample.offload_skips,
            "weight_storage": self.sample.weight_storage.value,
            "file_formats": list(self.request.architecture.stored_formats),
            "context_length": self.sample.context.context_length if self.sample.context else None,
            "context_overlap": self.sample.context.context_overlap if self.sample.context else None,
            "chunk_size": self.chunk_size,
            "encode_tile_size": self.encode.picture.tile_pixels,
            "decode_chunk_size": self.decode.frames.chunk_size,
            "tile_size": self.decode.frames.tile_pixels,
            "maps_bytes": self.decode.frames.maps_bytes,
            "usable_bytes": self.budget.usable_bytes,
            "stages": [
                {
                    "stage": prediction.stage.value,
                    "weights_bytes": prediction.weights_bytes,
                    "activation_bytes": prediction.activation_bytes,
                    "peak_bytes": prediction.peak_bytes,
                }
                for prediction in self.predictions
            ],
            "peak_bytes": self.peak_bytes,
            "binding_stage": self.binding_stage.stage.value,
            "reasons": list(self.reasons),
        }
