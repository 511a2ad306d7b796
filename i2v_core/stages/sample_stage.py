"""Sample: the denoiser makes the video's latents, step by step.

Shape legend: B batch, C latent channels, T latent frames, H/W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..errors import BadInputError, PlanMismatchError, RanOutError
from ..families import Conditioning, Denoiser, I2VModel, Placed, TensorMap, family_of
from ..families.facts import AUTO_SCHEDULER
from ..memory.meter import host_memory
from ..placement.attention import attention
from ..planning.approximations import Approximation
from ..planning.plan import Plan, Stage
from ..sampling.checkpoint import (
    CheckpointFile,
    Checkpointing,
    CheckpointWhen,
    checkpoint_key,
    weights_identity,
)
from ..sampling.context import in_windows
from ..sampling.loop import Guidance, SampleLoop
from ..sampling.noise import initial_noise
from ..sampling.schedulers import make_scheduler, noise_deviation, with_timesteps
from ..sampling.spill import SpillGuard
from .run import StageRun, running, until_it_fits
from .runtime import Runtime, StageReport

MAX_STEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSettings:
    """What the user sets for the sampling loop."""

    steps: int
    cfg: float
    seed: int
    scheduler: str = AUTO_SCHEDULER

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise BadInputError(f"{self.steps} steps are not possible", f"use 1 to {MAX_STEPS}")
        if not 1 <= self.cfg < math.inf:
            raise BadInputError(f"a cfg of {self.cfg} is not possible", "use 1 for no guidance, or more")


def sample(
    model: I2VModel,
    plan: Plan,
    conditioning: Conditioning,
    settings: SamplerSettings,
    runtime: Runtime,
    checkpointing: Checkpointing | None = None,
) -> tuple[Tensor, StageReport]:
    """The video's latents as the host's LATENT samples, fp32, on the CPU.

    With `checkpointing` it goes on from where the same video was when it was cancelled or the program ended.
    """
    _check_conditioning(plan, conditioning, settings)
    with running(Stage.SAMPLE, model, plan, runtime) as run:
        sampling = _Sampling(run, conditioning, settings, checkpointing)
        with sampling.kept():
            samples = until_it_fits(run, sampling.finish, where=lambda: sampling.where)
    if not torch.isfinite(samples).all():
        raise BadInputError(
            f"sampling in {plan.precision} gave values that are not finite", "choose bf16 or fp32 in VRAM Budget"
        )
    return samples, run.report()


class _Sampling:
    """One video under way. `finish` may fail and be called again: it goes on from the step that it was at."""

    def __init__(
        self,
        run: StageRun,
        conditioning: Conditioning,
        settings: SamplerSettings,
        checkpointing: Checkpointing | None,
    ) -> None:
        self._run, self._conditioning, self._settings = run, conditioning, settings
        self._family = family_of(run.model.architecture)
        with host_memory():
            config = run.model.architecture.config("scheduler")
            choice = self._family.facts.scheduler(settings.scheduler)
            scheduler = with_timesteps(make_scheduler(choice, config), settings.steps)
            noise_BCTHW = initial_noise(self._family.facts.latent_size(run.plan.request.size), settings.seed)
        self._frames = noise_BCTHW.shape[2]
        self._loop = SampleLoop(
            scheduler, noise_BCTHW.to(run.runtime.device) * noise_deviation(scheduler), self._on_step
        )

        self._checkpoint: CheckpointFile | None = None
        if checkpointing is not None and checkpointing.when is not CheckpointWhen.OFF:
            key = _checkpoint_key(run, conditioning, settings)
            self._checkpoint = CheckpointFile(checkpointing, key, settings.steps)

    @contextmanager
    def kept(self) -> Generator[None]:
        """Goes on from the checkpoint, where there is one; keeps one of what is done if the body fails."""
        file = self._checkpoint
        if file is None:
            yield
            return
        state = file.load(self._loop.latents_BCTHW)
        if state is not None:
            self._loop.resume(state)
            self._run.note(f"went on from step {state.steps_done} of {self._settings.steps}, kept from an earlier run")
        try:
            yield
        except RanOutError as error:
            if self._loop.steps_done and file.save(self._loop.state) is None:
                kept = f"; run again to go on from step {self._loop.steps_done}, kept in {file.path}"
                raise RanOutError(error.problem, error.remedy + kept) from None
            raise
        except BaseException:
            if file.is_worthwhile(self._loop.steps_done):
                file.save(self._loop.state)
            raise
        file.forget()

    @property
    def where(self) -> str:
        return f"at step {self._loop.steps_done} of {self._settings.steps}"

    def finish(self) -> Tensor:
        """The steps that are left, by the run's plan as it is now; the host's LATENT samples."""
        while (timestep := self._loop.next_timestep) is not None:
            self._run_with(self._denoiser_at(timestep))
        architecture, latents_BCTHW = self._run.model.architecture, self._loop.latents_BCTHW
        return self._family.latents_to_host(architecture, latents_BCTHW, self._conditioning.positive).float().cpu()

    def _denoiser_at(self, timestep: Tensor) -> Denoiser:
        """The first that is made for a timestep as high, or the last."""
        denoisers = self._family.denoisers(self._run.model.architecture)
        return next((it for it in denoisers if float(timestep) >= it.from_timestep), denoisers[-1])

    def _run_with(self, one: Denoiser) -> None:
        """The steps that are this denoiser's."""
        run, family, chosen = self._run, self._family, self._run.plan.sample
        self._spill = SpillGuard(run.runtime.free_bytes)
        run.begin(self._loop.steps_done, self._settings.steps)
        check_cancelled = run.runtime.check_cancelled
        with (
            run.place(one.component, by_layer=True) as denoiser,
            attention(denoiser.module, run.runtime.attention),
            family.chunked(denoiser.module, chosen.chunk_settings, runner=denoiser.runner, on_chunk=check_cancelled),
        ):
            guidance = self._guidance(denoiser)
            self._loop.run(
                lambda latents, timestep: guidance(latents, timestep, denoiser.dtype),
                goes_on=lambda timestep: self._denoiser_at(timestep) == one,
            )

    def _guidance(self, denoiser: Placed) -> Guidance:
        def denoise(latents_BCTHW: Tensor, timestep: Tensor, inputs: TensorMap) -> Tensor:
            return self._family.denoise(denoiser.module, latents_BCTHW, timestep, inputs)

        def placed(inputs: TensorMap) -> TensorMap:
            return {name: tensor.to(denoiser.device, denoiser.dtype) for name, tensor in inputs.items()}

        chosen, told = self._run.plan.sample, self._conditioning
        context = chosen.context
        scale = self._family.guidance_scale(self._settings.cfg, self._frames)
        return Guidance(
            in_windows(denoise, self._family, context, self._frames) if context else denoise,
            positive=placed(told.positive),
            negative=placed(told.negative) if told.negative else None,
            scale=scale.to(denoiser.device) if isinstance(scale, Tensor) else scale,
            batched=chosen.batched_guidance,
        )

    def _on_step(self, step: int, clean_BCTHW: Tensor) -> None:
        self._run.meter.log_step(step)
        if self._checkpoint is not None and self._checkpoint.is_due(step):
            problem = self._checkpoint.save(self._loop.state)
            if problem is not None:
                self._run.note(f"no checkpoint could be written, and sampling went on without: {problem}")
        self._run.progress(step, self._settings.steps, clean_BCTHW)
        self._run.runtime.check_cancelled()
        spilled = self._spill.after_step(step)
        if spilled is not None:
            self._run.note(spilled)
            # To a rung lower, as if memory had run out: which it has.
            raise torch.OutOfMemoryError("the driver spills over into host memory")


def _checkpoint_key(run: StageRun, conditioning: Conditioning, settings: SamplerSettings) -> str:
    """Everything that the result depends on beyond rounding."""
    chosen = run.plan.sample
    parts = {
        "model": run.model.architecture.fingerprint,
        "weights": weights_identity(run.model.folder),
        "size": str(run.plan.request.size),
        **asdict(settings),
        "scheduler": family_of(run.model.architecture).facts.scheduler(settings.scheduler).name,
        "precision": run.plan.precision,
        "approximation": str(Approximation.of(chosen)),
    }
    negative = conditioning.negative or {}
    tensors = {f"positive.{name}": it for name, it in conditioning.positive.items()}
    return checkpoint_key(parts, {**tensors, **{f"negative.{name}": it for name, it in negative.items()}})


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
