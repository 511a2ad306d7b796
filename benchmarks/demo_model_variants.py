"""Variants that `demo_model.py` compares: the pack's own stages under plans that differ in one setting.

Shapes: ``frames_FHWC`` in 0…1, ``clip_FCHW`` and ``picture_CHW`` in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from i2v_core import stages
from i2v_core.decoding import TilingSettings
from i2v_core.families import I2VModel, Prompt, VideoSize, family_of, load_model
from i2v_core.memory.device import device_facts
from i2v_core.placement.storage import WeightStorage
from i2v_core.planning.plan import DecodeSettings, EncodeSettings, Plan, SampleSettings, Stage
from i2v_core.planning.planner import make_plan
from i2v_core.planning.predict import with_settings
from i2v_core.planning.request import Budget, Request
from i2v_core.sampling.context import ContextWindows
from i2v_core.stages import StageReport
from i2v_core.units import GIB

CPU = torch.device("cpu")
# So little that the layers of the small denoiser are cut into several chunks.
WORKSPACE_BYTES = 500_000
REDUCED = (WeightStorage.INT8, WeightStorage.FP8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A sampled clip and the reports of its stages."""

    clip_FCHW: Tensor
    reports: tuple[StageReport, ...]

    @property
    def seconds(self) -> float:
        return sum(report.seconds for report in self.reports)

    def report(self, stage: Stage) -> StageReport:
        return next(report for report in self.reports if report.stage is stage)


class ClipMaker:
    """Samples clips of one model in one size."""

    def __init__(self, folder: Path, size: VideoSize, settings: stages.SamplerSettings) -> None:
        self._model: I2VModel = load_model(folder)
        self._size, self._settings = size, settings

    def plan(self, variant: Callable[[Plan], Plan]) -> Plan:
        """Plan everything unchunked in fp32, apply the variant, and predict the peaks."""
        guidance = self._settings.cfg != 1
        request = Request(architecture=self._model.architecture, size=self._size, guidance=guidance, precision="fp32")
        plain = with_settings(
            make_plan(request, Budget(free_bytes=GIB), device_facts(CPU)),
            encode=EncodeSettings(),
            sample=SampleSettings(compute_dtype=torch.float32, batched_guidance=True),
            decode=DecodeSettings(tiling=TilingSettings(chunk_size=self._size.frames)),
        )
        return variant(plain)

    def make(self, plan: Plan, picture_CHW: Tensor, text: str) -> Clip:
        """Sample one clip; the noise depends on the seed alone."""
        runtime = stages.Runtime(device=CPU)
        image_FHWC = (picture_CHW.permute(1, 2, 0)[None] + 1) / 2
        prompt = Prompt(image_FHWC=image_FHWC, text=text, negative_text="", fps=8)
        conditioning, encoding = stages.encode(self._model, plan, prompt, runtime)
        samples, sampling = stages.sample(self._model, plan, conditioning, self._settings, runtime)
        frames_FHWC, decoding = stages.decode(self._model, plan, samples, runtime)
        clip_FCHW = frames_FHWC.permute(0, 3, 1, 2) * 2 - 1
        return Clip(clip_FCHW=clip_FCHW, reports=(encoding, sampling, decoding))


def plain(plan: Plan) -> Plan:
    return plan


def chunked(plan: Plan) -> Plan:
    """Chunk layers, run one guidance branch at a time, offload skip connections, decode one frame at a time."""
    sample = replace(plan.sample.settings, workspace_bytes=WORKSPACE_BYTES, batched_guidance=False, offload_skips=True)
    return with_settings(plan, sample=sample, decode=DecodeSettings(tiling=TilingSettings(chunk_size=1)))


def streamed(plan: Plan) -> Plan:
    return with_settings(
        plan,
        encode=replace(plan.encode.settings, streamed=True),
        sample=replace(plan.sample.settings, streamed=True),
        decode=replace(plan.decode.settings, streamed=True),
    )


def tiled(plan: Plan) -> Plan:
    """Decode frames layer by layer in tiles of rows, with all feature maps in host memory."""
    tiling = TilingSettings(chunk_size=1, tile_pixels=32, maps_bytes=0)
    return with_settings(plan, decode=DecodeSettings(tiling=tiling))


def precision(dtype: torch.dtype) -> Callable[[Plan], Plan]:
    return lambda plan: with_settings(plan, sample=replace(plan.sample.settings, compute_dtype=dtype))


def windowed(plan: Plan) -> Plan:
    """Use context windows of half the clip that overlap by a quarter of their length, as approximate plans do."""
    length = family_of(plan.request.architecture).facts.latent_size(plan.request.size).latent_frames // 2
    context = ContextWindows(context_length=length, context_overlap=length // 4)
    return with_settings(plan, sample=replace(plan.sample.settings, context=context))


def stored(storage: WeightStorage) -> Callable[[Plan], Plan]:
    return lambda plan: with_settings(plan, sample=replace(plan.sample.settings, weight_storage=storage))


VARIANTS: dict[str, Callable[[Plan], Plan]] = {
    "plain": plain,
    "chunked": chunked,
    "streamed": streamed,
    "tiled": tiled,
    "bf16": precision(torch.bfloat16),
    # Many times slower on a CPU, which computes fp16 by conversion.
    "fp16": precision(torch.float16),
    "context windows": windowed,
    **{f"{storage.value} weights": stored(storage) for storage in REDUCED if storage.available},
}
