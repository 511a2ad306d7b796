"""A video that is sampled: what it is told, how far it has come, and what is kept of it on disk.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """A video to be sampled. `state` is where it is already; None: at its beginning, or where its checkpoint is.

    The callbacks are as in `Runtime`, of this clip alone.
    """

    conditioning: Conditioning
    settings: SamplerSettings
    state: LoopState | None = None
    check_cancelled: Callable[[], None] = nothing
    on_progress: Callable[[int, int, Tensor | None], None] = no_progress


class ClipSampler:
    """A clip within a stage. Its loop may fail and go on: it is at a whole step always.

    Raises:
        PlanMismatchError: its conditioning was made for another plan.
        BadInputError: its settings do not go with the plan or the model.
    """

    def __init__(self, run: StageRun, clip: SampleRequest, checkpointing: Checkpointing | None) -> None:
        _check_conditioning(run.plan, clip)
        self.clip = clip
        self._run = run
        self._family = family_of(run.model.architecture)
        with host_memory():
            config = run.model.architecture.config("scheduler")
            choice = self._family.facts.scheduler(clip.settings.scheduler)
            scheduler = with_timesteps(make_scheduler(choice, config), clip.settings.steps)
            noise_BCTHW = initial_noise(self._family.facts.latent_size(run.plan.request.size), clip.settings.seed)
        self.frames = noise_BCTHW.shape[2]
        self.loop = SampleLoop(
            scheduler, noise_BCTHW.to(run.runtime.device) * init_noise_sigma(scheduler), self._on_step
        )

        self._file: CheckpointFile | None = None
        if checkpointing is not None and checkpointing.when is not CheckpointWhen.OFF:
            self._file = CheckpointFile(checkpointing, _checkpoint_key(run, clip), clip.settings.steps)

    @property
    def where(self) -> str:
        return f"at step {self.loop.steps_done} of {self.clip.settings.steps}"

    @contextmanager
    def kept(self) -> Generator[None]:
        """Goes on from where it was, where it was anywhere; keeps a checkpoint of what is done if the body fails."""
        self.resume()
        try:
            yield
        except RanOutError as error:
            done, file = self.loop.steps_done, self._file
            if file is not None and done and file.save(self.loop.state) is None:
                kept = f"; run again to go on from step {done}, kept in {file.path}"
                raise RanOutError(error.problem, error.remedy + kept) from None
            raise
        except BaseException:
            self.save_checkpoint()
            raise
        self.delete_checkpoint()

    def resume(self) -> None:
        """Goes on from the clip's state, or else from its checkpoint, where there is one."""
        state = self.clip.state
        if state is not None and self._file is not None:
            self._file.goes_on_from(state)
        elif state is None and self._file is not None:
            state = self._file.load(self.loop.latents_BCTHW)
            if state is not None:
                steps = self.clip.settings.steps
                self._run.note(f"went on from step {state.steps_done} of {steps}, kept from an earlier run")
        if state is not None:
            self.loop.resume(state)

    def save_checkpoint(self) -> None:
        """A checkpoint of what is done, where that would be missed."""
        if self._file is not None and self._file.is_worthwhile(self.loop.steps_done):
            self._file.save(self.loop.state)

    def delete_checkpoint(self) -> None:
        """The checkpoint, of a clip that is done."""
        if self._file is not None:
            self._file.delete()

    def samples(self) -> Tensor:
        """The host's LATENT samples, fp32, on the CPU."""
        architecture, told = self._run.model.architecture, self.clip.conditioning.positive
        return self._family.latents_to_host(architecture, self.loop.latents_BCTHW, told).float().cpu()

    def _on_step(self, step: int, clean_BCTHW: Tensor) -> None:
        if self._file is not None and self._file.is_due(step):
            problem = self._file.save(self.loop.state)
            if problem is not None:
                self._run.note(f"no checkpoint could be written, and sampling went on without: {problem}")
        self._run.progress(step, self.clip.settings.steps, clean_BCTHW)
        with self._run.meter.paused():
            self.clip.on_progress(step, self.clip.settings.steps, clean_BCTHW)


def check_finite(plan: Plan, samples: Tensor) -> None:
    """Raises `BadInputError` unless they are."""
    if not torch.isfinite(samples).all():
        raise BadInputError(
            f"sampling in {plan.precision} gave values that are not finite", "choose bf16 or fp32 in VRAM Budget"
        )


def _checkpoint_key(run: StageRun, clip: SampleRequest) -> str:
    """Everything that the result depends on beyond rounding."""
    chosen, settings = run.plan.sample.settings, clip.settings
    parts = {
        "model": run.model.architecture.fingerprint,
        "weights": weights_identity(run.model.folder, run.model.files),
        "size": str(run.plan.request.size),
        **asdict(settings),
        "scheduler": family_of(run.model.architecture).facts.scheduler(settings.scheduler).name,
        "precision": run.plan.precision,
        "approximation": str(Approximation.of(chosen)),
    }
    positive, negative = clip.conditioning.positive, clip.conditioning.negative or {}
    tensors = {f"positive.{name}": it for name, it in positive.items()}
    return checkpoint_key(parts, {**tensors, **{f"negative.{name}": it for name, it in negative.items()}})


def _check_conditioning(plan: Plan, clip: SampleRequest) -> None:
    request, conditioning, cfg = plan.request, clip.conditioning, clip.settings.cfg
    if conditioning.family != request.architecture.family or conditioning.size != request.size:
        raise PlanMismatchError(
            f"the conditioning was made for {conditioning.family} {conditioning.size}, "
            f"the plan for {request.architecture.family} {request.size}",
            "connect the same VRAM Budget to I2V Encode and to Chunked Sampler",
        )
    if conditioning.negative is None and cfg != 1:
        raise BadInputError(
            f"a cfg of {cfg} needs guidance, which is off in the plan",
            "set cfg to 1, or turn guidance on in VRAM Budget",
        )
