"""A plan: how each stage of one request runs, with the peak that is predicted for it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Generic, TypeAlias, TypeVar

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
    """Memory that a stage needs at its peak, before any margin."""

    stage: Stage

    weights_bytes: int
    """Weights on the device at the peak."""

    activation_bytes: int
    """Live tensors beside the weights at the peak."""

    host_bytes: int = 0
    """Host memory beside the loaded model: weights prepared for streaming, offloaded skip connections, finished
    frames."""

    @property
    def peak_bytes(self) -> int:
        return self.weights_bytes + self.activation_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePrediction(StagePrediction):
    """Memory that sampling needs at its peak, and how finely its layers are chunked."""

    chunk_size: int = 1
    """Frames of one clip that the largest per-frame layer takes at once."""

    layer_calls: int = 1
    """Calls of layers in one step, the chunks of each layer counted one by one."""

    layers: int = 1
    """Layers of the denoiser: its calls in one pass where none is chunked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings:
    """Settings that every stage has."""

    streamed: bool = False
    """Weights are transferred when they are used: layer by layer where the stage runs so, else one leaf module at a
    time. Otherwise all of them stay on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeSettings(StageSettings):
    """Settings of the encode stage."""

    tiling: TilingSettings = ONE_FRAME_UNTILED
    """How the autoencoder takes the picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSettings(StageSettings):
    """Settings of the sample stage."""

    compute_dtype: torch.dtype

    batched_guidance: bool
    """Both guidance branches go through the denoiser in one pass."""

    workspace_bytes: int | None = None
    """The most that one layer call may allocate: larger layers are chunked. None: no layer is."""

    offload_skips: bool = False
    """Skip connections wait in host memory."""

    weight_storage: WeightStorage = WeightStorage.AS_COMPUTED
    """The format in which weights are stored between calls of their layer; in 8 bits the result is approximate."""

    context: ContextWindows | None = None
    """The denoiser sees one window of the clip at a time, which makes the result approximate. None: the whole clip."""

    @property
    def chunk_settings(self) -> ChunkSettings:
        workspace_bytes = sys.maxsize if self.workspace_bytes is None else self.workspace_bytes
        return ChunkSettings(workspace_bytes=workspace_bytes, offload_skips=self.offload_skips)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings(StageSettings):
    """Settings of the decode stage."""

    tiling: TilingSettings
    """How many frames the autoencoder takes at once, and in what tiles."""


SettingsT_co = TypeVar("SettingsT_co", bound=StageSettings, covariant=True)
PredictionT_co = TypeVar("PredictionT_co", bound=StagePrediction, covariant=True)


@dataclass(frozen=True, slots=True)
class StagePlan(Generic[SettingsT_co, PredictionT_co]):
    """A stage's settings, with the prediction that was made for them."""

    settings: SettingsT_co
    prediction: PredictionT_co


EncodePlan: TypeAlias = StagePlan[EncodeSettings, StagePrediction]
SamplePlan: TypeAlias = StagePlan[SampleSettings, SamplePrediction]
DecodePlan: TypeAlias = StagePlan[DecodeSettings, StagePrediction]
AnyStagePlan: TypeAlias = StagePlan[StageSettings, StagePrediction]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The fastest settings found that make the request within the budget.

        plan.sample.settings.streamed
        plan.prediction(Stage.DECODE).peak_bytes
        plan.with_stage(StagePlan(settings, prediction))

    A changed plan is a new one; whatever follows from its stages is computed from them.
    """

    request: Request
    device: DeviceFacts
    budget: Budget
    encode: EncodePlan
    sample: SamplePlan
    decode: DecodePlan

    @property
    def stages(self) -> Mapping[Stage, AnyStagePlan]:
        """In the order in which they run."""
        return {Stage.ENCODE: self.encode, Stage.SAMPLE: self.sample, Stage.DECODE: self.decode}

    @property
    def predictions(self) -> tuple[StagePrediction, ...]:
        """In the order in which the stages run."""
        return tuple(it.prediction for it in self.stages.values())

    def prediction(self, stage: Stage) -> StagePrediction:
        return self.stages[stage].prediction

    def with_stage(self, stage_plan: AnyStagePlan) -> Plan:
        """The plan with this in place of what it had for the same stage."""
        changes: dict[str, Any] = {stage_plan.prediction.stage.value: stage_plan}
        return replace(self, **changes)

    @property
    def binding_stage(self) -> StagePrediction:
        """The stage with the highest peak: the one that decides what fits."""
        return max(self.predictions, key=lambda prediction: prediction.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.binding_stage.peak_bytes

    @property
    def host_bytes(self) -> int:
        """The most host memory that a stage needs beside the loaded model."""
        return max(prediction.host_bytes for prediction in self.predictions)

    @property
    def chunk_size(self) -> int:
        """Frames that the denoiser's largest per-frame layer takes at once."""
        return self.sample.prediction.chunk_size

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.sample.settings.compute_dtype

    @property
    def precision(self) -> str:
        return precision_name(self.compute_dtype)

    def check_made_for(self, architecture: Architecture) -> None:
        """Raise `PlanMismatchError` unless the plan was made for a model of this architecture."""
        if self.request.architecture != architecture:
            raise PlanMismatchError(
                "the plan was made for another model", "connect the same I2V Loader to VRAM Budget and to this node"
            )
