"""The three stages of a run. Each brings in what it needs, runs, and leaves nothing on the device.

Shape legend: C latent channels, T latent frames, F pixel frames, H/W height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .chunking import LayerRunner
from .errors import BadInputError, PlanMismatchError
from .families import Conditioning, Family, I2VModel, Prompt, TensorMap, family_of
from .memory.meter import host_memory
from .memory.stage_meter import StageMeter, stage_meter
from .placement.attention import AttentionBackend, attention
from .placement.placed import placed
from .placement.streaming import streamed, streamed_leaves
from .planning.margin import expected_bytes, uncertainty_bytes
from .planning.plan import Plan, Stage
from .planning.predict import component_dtype
from .sampling.loop import Guidance, sample_loop
from .sampling.noise import initial_noise
from .sampling.schedulers import make_scheduler
from .units import format_gib

logger = logging.getLogger(__name__)

MAX_STEPS = 1000


def _never_cancelled() -> None:
    pass


def _no_progress(done: int, total: int, latents_BCTHW: Tensor | None) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What the caller lends to a stage.

    `check_cancelled` raises the caller's own exception to stop; it is called at least once a chunk.
    `on_progress` takes what is done, the total, and while sampling the clean latents so far (1, C, T, H, W).
    """

    device: torch.device
    attention: AttentionBackend = AttentionBackend.SDPA
    check_cancelled: Callable[[], None] = _never_cancelled
    on_progress: Callable[[int, int, Tensor | None], None] = _no_progress


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """What a stage was predicted to take, give or take, what it took, and how long."""

    stage: Stage
    predicted_peak_bytes: int
    uncertainty_bytes: int
    measured_peak_bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.stage.value}: predicted {format_gib(self.predicted_peak_bytes)} ± "
            f"{format_gib(self.uncertainty_bytes)}, measured {format_gib(self.measured_peak_bytes)}, "
            f"{self.seconds:.1f} s"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSettings:
    """What the user sets for the sampling loop."""

    steps: int
    cfg: float
    seed: int
    scheduler: str = "ddim"

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise BadInputError(f"{self.steps} steps are not possible", f"use 1 to {MAX_STEPS}")
        if self.cfg < 1:
            raise BadInputError(f"a cfg of {self.cfg} is below 1", "use 1 for no guidance, or more")


class _StageRun:
    """One stage under way: places components and measures."""

    def __init__(self, stage: Stage, model: I2VModel, plan: Plan, runtime: Runtime, meter: StageMeter) -> None:
        self._stage, self._model, self._plan, self._runtime = stage, model, plan, runtime
        settings = {Stage.ENCODE: plan.encode, Stage.SAMPLE: plan.sample, Stage.DECODE: plan.decode}[stage]
        self._streamed = settings.streamed
        self.meter = meter

    def dtype(self, component: str) -> torch.dtype:
        return component_dtype(self._model.architecture, component, self._plan.sample.compute_dtype)

    @contextmanager
    def place(self, component: str) -> Generator[nn.Module]:
        """The component on the device, or coming there leaf by leaf where the plan streams it."""
        self._runtime.check_cancelled()
        module, device, dtype = self._model.modules[component], self._runtime.device, self.dtype(component)
        if self._streamed:
            with streamed_leaves(module, device, dtype):
                yield module
        else:
            with placed(module, device, dtype), self.meter.weights(module):
                yield module

    @contextmanager
    def place_denoiser(self, component: str) -> Generator[tuple[nn.Module, LayerRunner]]:
        """The denoiser, with the runner that brings in its layers' weights where the plan streams them."""
        module, device, dtype = self._model.modules[component], self._runtime.device, self.dtype(component)
        if self._streamed:
            with streamed(module, device, dtype) as stream:
                yield module, stream
        else:
            with self.place(component):
                yield module, LayerRunner()

    def report(self) -> StageReport:
        prediction = self._plan.stage(self._stage)
        report = StageReport(
            stage=self._stage,
            predicted_peak_bytes=expected_bytes(prediction, self._plan.device),
            uncertainty_bytes=uncertainty_bytes(prediction, self._plan.device),
            measured_peak_bytes=self.meter.peak_bytes,
            seconds=self.meter.seconds,
        )
        logger.info("%s", report)
        return report


@contextmanager
def _running(stage: Stage, model: I2VModel, plan: Plan, runtime: Runtime) -> Generator[_StageRun]:
    plan.check_made_for(model.architecture)
    with torch.no_grad(), stage_meter(runtime.device) as meter:
        yield _StageRun(stage, model, plan, runtime, meter)


def encode(model: I2VModel, plan: Plan, prompt: Prompt, runtime: Runtime) -> tuple[Conditioning, StageReport]:
    """What the denoiser is told: prompt and picture, encoded, on the CPU."""
    family = family_of(model.architecture)
    with _running(Stage.ENCODE, model, plan, runtime) as run:
        conditioning = family.encode(model, prompt, plan.request.size, plan.request.guidance, run.place)
    return conditioning, run.report()


def sample(
    model: I2VModel, plan: Plan, conditioning: Conditioning, settings: SamplerSettings, runtime: Runtime
) -> tuple[Tensor, StageReport]:
    """The video's latents as the host's LATENT samples, fp32, on the CPU."""
    family = family_of(model.architecture)
    _check_conditioning(plan, conditioning, settings)
    device, dtype = runtime.device, plan.sample.compute_dtype
    scheduler = make_scheduler(settings.scheduler, model.architecture.config("scheduler"))
    scheduler.set_timesteps(settings.steps)
    noise_BCTHW = initial_noise(family.facts.latent_size(plan.request.size), settings.seed)

    with _running(Stage.SAMPLE, model, plan, runtime) as run, run.place_denoiser(family.denoiser) as (denoiser, runner):
        guidance = Guidance(
            lambda latents, timestep, inputs: family.denoise(denoiser, latents, timestep, inputs),
            positive=_to_device(conditioning.positive, device, dtype),
            negative=_to_device(conditioning.negative, device, dtype) if conditioning.negative else None,
            cfg=settings.cfg,
            batched=plan.sample.batched_guidance,
        )

        def on_step(step: int, clean_BCTHW: Tensor) -> None:
            run.meter.log_step(step)
            runtime.on_progress(step, settings.steps, clean_BCTHW)
            runtime.check_cancelled()

        chunks = plan.sample.chunk_settings
        with (
            attention(denoiser, runtime.attention),
            family.chunked(denoiser, chunks, runner=runner, on_chunk=runtime.check_cancelled),
        ):
            latents_BCTHW = sample_loop(
                lambda latents, timestep: guidance(latents, timestep, dtype),
                scheduler,
                noise_BCTHW.to(device) * scheduler.init_noise_sigma,
                on_step,
            )
        samples = family.latents_to_host(model.architecture, latents_BCTHW).float().cpu()
    if not torch.isfinite(samples).all():
        raise BadInputError(
            f"sampling in {plan.precision} gave values that are not finite", "choose bf16 or fp32 in VRAM Budget"
        )
    return samples, run.report()


def decode(model: I2VModel, plan: Plan, samples: Tensor, runtime: Runtime) -> tuple[Tensor, StageReport]:
    """Frames (F, H, W, 3) in 0…1, fp32, on the CPU; the device holds one chunk of frames at a time."""
    family = family_of(model.architecture)
    _check_samples(family, plan, samples)
    frames_FHWC: Tensor | None = None
    with _running(Stage.DECODE, model, plan, runtime) as run, run.place(family.decoder) as decoder:
        for start in range(0, len(samples), plan.decode.chunk_size):
            runtime.check_cancelled()
            chunk = samples[start : start + plan.decode.chunk_size]
            decoded_FHWC = family.decode(decoder, chunk, plan.decode.tile)
            if frames_FHWC is None:
                with host_memory():
                    frames_FHWC = torch.empty(len(samples), *decoded_FHWC.shape[1:])
            frames_FHWC[start : start + len(chunk)] = decoded_FHWC
            del decoded_FHWC
            runtime.on_progress(start + len(chunk), len(samples), None)
    assert frames_FHWC is not None
    return frames_FHWC, run.report()


def _to_device(inputs: TensorMap, device: torch.device, dtype: torch.dtype) -> TensorMap:
    return {name: tensor.to(device, dtype) for name, tensor in inputs.items()}


def _check_conditioning(plan: Plan, conditioning: Conditioning, settings: SamplerSettings) -> None:
    request = plan.request
    if conditioning.family != request.architecture.family or conditioning.size != request.size:
        raise PlanMismatchError(
            f"the conditioning was made for {conditioning.family} {conditioning.size}, "
            f"the plan for {request.architecture.family} {request.size}",
            "connect the same VRAM Budget to I2V Encode and to Chunked Sampler",
        )
    if conditioning.negative is None and settings.cfg != 1:
        raise BadInputError(
            f"a cfg of {settings.cfg} needs guidance, which is off in the plan",
            "set cfg to 1, or turn guidance on in VRAM Budget",
        )


def _check_samples(family: Family, plan: Plan, samples: Tensor) -> None:
    channels = family.facts.latent_channels
    if samples.ndim != 4 or samples.shape[0] < 1 or samples.shape[1] != channels:
        raise BadInputError(
            f"the latent has shape {tuple(samples.shape)}, but {family.facts.display_name} decodes "
            f"(frames, {channels}, height, width)",
            "connect the LATENT of Chunked Sampler",
        )
    planned = family.facts.latent_size(plan.request.size)
    if samples.shape[2:] != (planned.latent_height, planned.latent_width):
        raise PlanMismatchError(
            f"the latent is {samples.shape[3]}×{samples.shape[2]}, the plan's is "
            f"{planned.latent_width}×{planned.latent_height} (in latent space)",
            "make the plan for the latent's size",
        )
    if not torch.isfinite(samples).all():
        raise BadInputError("the latent holds values that are NaN or infinite", "sample again in bf16 or fp32")
