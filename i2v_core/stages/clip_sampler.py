"""Sampling of one video: its request, its loop, and its checkpoint on disk.

Shape legend: B batch, C latent channels, T latent frames, H/W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..errors import BadInputError, PlanMismatchError, RanOutError
from ..families import Conditioning, family_of
from ..families.facts import AUTO_SCHEDULER
from ..memory.meter import host_memory
from ..planning.approximations import Approximation
from ..planning.plan import Plan
from ..sampling.checkpoint import (
    CheckpointFile,
    Checkpointing,
    CheckpointWhen,
    checkpoint_key,
    weights_identity,
)
from ..sampling.loop import SampleLoop
from ..sampling.noise import initial_noise
from ..sampling.schedulers import init_noise_sigma, make_scheduler, with_timesteps
from ..sampling.state import LoopState
from .run import StageRun
from .runtime import no_progress, nothing

MAX_STEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSettings:
    """The user's settings for the sampling loop.

    Raises:
        BadInputError: a number is out of its range.
    """

    steps: int

    cfg: float
    """Scale of classifier-free guidance; 1 turns it off."""

    seed: int

    scheduler: str = AUTO_SCHEDULER
    """One of `sampling.schedulers.SCHEDULERS`."""

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise BadInputError(f"{self.steps} steps are not possible", f"use 1 to {MAX_STEPS}")
        if not 1 <= self.cfg < math.inf:
            raise BadInputError(f"a cfg of {self.cfg} is not possible", "use 1 for no guidance, or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """A video to sample."""

    conditioning: Conditioning
    settings: SamplerSettings

    state: LoopState | None = None
    """State to continue from. None: the clip's checkpoint if there is one, else the beginning."""

    check_cancelled: Callable[[], None] = nothing
    """Same as `Runtime.check_cancelled`, for this clip alone."""

    on_progress: Callable[[int, int, Tensor | None], None] = no_progress
    """Same as `Runtime.on_progress`, for this clip alone."""


class ClipSampler:
    """The sampling loop of one clip, with its checkpoint. After a failed step it can continue from the step before.

    Raises:
        PlanMismatchError: the conditioning was made for another plan.
        BadInputError: the settings do not suit the plan or the model.
    """

    def __init__(self, run: StageRun, request: SampleRequest, checkpointing: Checkpointing | None) -> None:
        _check_conditioning(run.plan, request)
        self.request = request
        self._run = run
        self._family = family_of(run.model.architecture)
        with host_memory():
            config = run.model.architecture.config("scheduler")
            choice = self._family.facts.scheduler(request.settings.scheduler)
            scheduler = with_timesteps(make_scheduler(choice, config), request.settings.steps)
            noise_BCTHW = initial_noise(self._family.facts.latent_size(run.plan.request.size), request.settings.seed)
        self.frames = noise_BCTHW.shape[2]
        self.loop = SampleLoop(
            scheduler, noise_BCTHW.to(run.runtime.device) * init_noise_sigma(scheduler), self._on_step
        )

        self._file: CheckpointFile | None = None
        if checkpointing is not None and checkpointing.when is not CheckpointWhen.OFF:
            self._file = CheckpointFile(checkpointing, _checkpoint_key(run, request), request.settings.steps)

    @property
    def progress_text(self) -> str:
        return f"at step {self.loop.steps_done} of {self.request.settings.steps}"

    @contextmanager
    def checkpointed(self) -> Generator[None]:
        """Resume from the clip's state or checkpoint; save a checkpoint if the body fails, delete it if it succeeds."""
        self.resume()
        try:
            yield
        except RanOutError as error:
            done, file = self.loop.steps_done, self._file
            if file is not None and done and file.save(self.loop.state) is None:
                resumable = f"; run again to continue from step {done}, saved in {file.path}"
                raise RanOutError(error.problem, error.remedy + resumable) from None
            raise
        except BaseException:
            self.save_checkpoint()
            raise
        self.delete_checkpoint()

    def resume(self) -> None:
        """Continue from the request's state, or else from the checkpoint if there is one."""
        state = self.request.state
        if state is not None and self._file is not None:
            self._file.set_resumed_from(state)
        elif state is None and self._file is not None:
            state = self._file.load(self.loop.latents_BCTHW)
            if state is not None:
                steps = self.request.settings.steps
                self._run.note(f"resumed from step {state.steps_done} of {steps}, saved by an earlier run")
        if state is not None:
            self.loop.resume(state)

    def save_checkpoint(self) -> None:
        """Write a checkpoint if enough work would be lost without it."""
        if self._file is not None and self._file.is_worthwhile(self.loop.steps_done):
            self._file.save(self.loop.state)

    def delete_checkpoint(self) -> None:
        """Delete the checkpoint of a finished clip."""
        if self._file is not None:
            self._file.delete()

    def samples(self) -> Tensor:
        """Return the host's LATENT samples, fp32, on the CPU."""
        architecture, positive = self._run.model.architecture, self.request.conditioning.positive
        return self._family.latents_to_host(architecture, self.loop.latents_BCTHW, positive).float().cpu()

    def _on_step(self, step: int, clean_BCTHW: Tensor) -> None:
        if self._file is not None and self._file.is_due(step):
            problem = self._file.save(self.loop.state)
            if problem is not None:
                self._run.note(f"no checkpoint could be written, sampling continues without: {problem}")
        self._run.progress(step, self.request.settings.steps, clean_BCTHW)
        with self._run.meter.paused():
            self.request.on_progress(step, self.request.settings.steps, clean_BCTHW)


def check_finite(plan: Plan, samples: Tensor) -> None:
    """Check sampled latents.

    Raises:
        BadInputError: a value is NaN or infinite.
    """
    if not torch.isfinite(samples).all():
        raise BadInputError(
            f"sampling in {plan.precision} gave values that are not finite", "choose bf16 or fp32 in VRAM Budget"
        )


def _checkpoint_key(run: StageRun, request: SampleRequest) -> str:
    """Identify everything that the result depends on, beyond rounding."""
    chosen, settings = run.plan.sample.settings, request.settings
    parts = {
        "model": run.model.architecture.fingerprint,
        "weights": weights_identity(run.model.folder, run.model.files),
        "size": str(run.plan.request.size),
        **asdict(settings),
        "scheduler": family_of(run.model.architecture).facts.scheduler(settings.scheduler).name,
        "precision": run.plan.precision,
        "approximation": str(Approximation.of(chosen)),
    }
    positive, negative = request.conditioning.positive, request.conditioning.negative or {}
    tensors = {f"positive.{name}": it for name, it in positive.items()}
    return checkpoint_key(parts, {**tensors, **{f"negative.{name}": it for name, it in negative.items()}})


def _check_conditioning(plan: Plan, request: SampleRequest) -> None:
    planned, conditioning, cfg = plan.request, request.conditioning, request.settings.cfg
    if conditioning.family != planned.architecture.family or conditioning.size != planned.size:
        raise PlanMismatchError(
            f"the conditioning was made for {conditioning.family} {conditioning.size}, "
            f"the plan for {planned.architecture.family} {planned.size}",
            "connect the same VRAM Budget to I2V Encode and to Chunked Sampler",
        )
    if conditioning.negative is None and cfg != 1:
        raise BadInputError(
            f"a cfg of {cfg} needs guidance, which is off in the plan",
            "set cfg to 1, or turn guidance on in VRAM Budget",
        )
