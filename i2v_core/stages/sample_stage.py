"""Sample: the denoiser makes the video's latents, step by step.

Shape legend: B batch, C latent channels, T latent frames, H/W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInputError, PlanMismatchError
from ..families import Conditioning, I2VModel, TensorMap, family_of
from ..placement.attention import attention
from ..planning.plan import Plan, Stage
from ..sampling.context import in_windows
from ..sampling.loop import Guidance, sample_loop
from ..sampling.noise import initial_noise
from ..sampling.schedulers import make_scheduler
from .run import running
from .runtime import Runtime, StageReport

MAX_STEPS = 1000


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

    with (
        running(Stage.SAMPLE, model, plan, runtime) as run,
        run.place(family.denoiser, by_layer=True) as denoiser,
    ):

        def denoise(latents_BCTHW: Tensor, timestep: Tensor, inputs: TensorMap) -> Tensor:
            return family.denoise(denoiser.module, latents_BCTHW, timestep, inputs)

        context = plan.sample.context
        guidance = Guidance(
            in_windows(denoise, family, context, noise_BCTHW.shape[2]) if context else denoise,
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
            attention(denoiser.module, runtime.attention),
            family.chunked(denoiser.module, chunks, runner=denoiser.runner, on_chunk=runtime.check_cancelled),
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
