"""The sampling loop and guidance.

Shape legend: B guidance branches of each clip, N clips that are denoised together, C latent channels, T latent frames,
H/W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..families import TensorMap
from .schedulers import scaled_input
from .state import LoopState, SchedulerState

# (latents_BCTHW, timestep, inputs) -> prediction_BCTHW
Denoise = Callable[[Tensor, Tensor, TensorMap], Tensor]

# Called after each step with its number, from 1, and the current estimate of the clean latents (1, C, T, H, W).
OnStep = Callable[[int, Tensor], None]


class SampleLoop:
    """Denoises scaled noise (1, C, T, H, W) over the scheduler's timesteps, which must have been set.

    Keeps the latents in the noise's dtype. A step that fails leaves no trace: `run` continues from the step before it,
    also with another `predict`.

        loop = SampleLoop(scheduler, noise_BCTHW * init_noise_sigma(scheduler), on_step=lambda step, clean_BCTHW: None)
        latents_BCTHW = loop.run(lambda latents_BCTHW, timestep: guidance(latents_BCTHW, timestep, dtype))
    """

    def __init__(self, scheduler: Any, latents_BCTHW: Tensor, on_step: OnStep) -> None:
        self.latents_BCTHW = latents_BCTHW
        self.steps_done = 0
        self._scheduler, self._on_step = scheduler, on_step
        self._history = SchedulerState(scheduler)

    @property
    def next_timestep(self) -> Tensor | None:
        """The timestep of the next step; None when all are done."""
        timesteps: Tensor = self._scheduler.timesteps
        return timesteps[self.steps_done] if self.steps_done < len(timesteps) else None

    def run(self, predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Take all remaining steps; return the latents."""
        while self.next_timestep is not None:
            step_batch([self], predict)
        return self.latents_BCTHW

    @property
    def scaled(self) -> Tensor:
        """The denoiser's input (1, C, T, H, W) for the next step, which must exist."""
        assert self.next_timestep is not None
        return scaled_input(self._scheduler, self.latents_BCTHW, self.next_timestep)

    def step(self, prediction_BCTHW: Tensor) -> None:
        """Take the next step, which must exist, with the denoiser's prediction."""
        assert self.next_timestep is not None
        clean_BCTHW = self._step(prediction_BCTHW, self.next_timestep)
        self.steps_done += 1
        self._on_step(self.steps_done, clean_BCTHW)

    @property
    def state(self) -> LoopState:
        """The loop's state between two steps."""
        return LoopState(
            steps_done=self.steps_done, latents_BCTHW=self.latents_BCTHW, scheduler=self._history.changes()
        )

    def resume(self, state: LoopState) -> None:
        """Continue from the state of a loop with the same scheduler, timesteps and noise."""
        like = self.latents_BCTHW
        self.steps_done = state.steps_done
        self.latents_BCTHW = state.latents_BCTHW.to(like.device, like.dtype)
        self._history.restore(state.scheduler, like.device)

    def _step(self, prediction_BCTHW: Tensor, timestep: Tensor) -> Tensor:
        """Take one step of the scheduler, or undo it if it fails; return the estimate of the clean latents."""
        before = self._history.changes()
        try:
            result = self._scheduler.step(prediction_BCTHW, timestep, self.latents_BCTHW)
        except BaseException:
            # Multistep schedulers change their history before they can fail.
            self._history.restore(before, self.latents_BCTHW.device)
            raise
        self.latents_BCTHW = result.prev_sample
        return getattr(result, "pred_original_sample", self.latents_BCTHW)


def step_batch(loops: Sequence[SampleLoop], predict: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Take one step of loops that are at the same timestep, with one prediction (N, C, T, H, W) for all.

    If the prediction fails, no loop has stepped. If one loop's step fails, only the loops before it have.
    """
    timestep = loops[0].next_timestep
    assert timestep is not None
    predictions_NCTHW = predict(_joined([loop.scaled for loop in loops]), timestep)
    for loop, prediction_BCTHW in zip(loops, torch.split(predictions_NCTHW, 1), strict=True):
        loop.step(prediction_BCTHW)


class Guidance:
    """Classifier-free guidance (Ho and Salimans, 2022): negative + scale · (positive − negative).

    Takes the tensors of N clips concatenated per branch, (N, …). The scale is one number, or one per clip, per frame,
    or both (N or 1, 1, T or 1, 1, 1). Batched guidance runs both branches in one pass of the denoiser; sequential
    guidance runs two passes of half the memory. Without a negative branch, or at a scale of 1, there is one branch.
    """

    def __init__(
        self,
        denoise: Denoise,
        positive: TensorMap,
        negative: TensorMap | None,
        scale: float | Tensor,
        batched: bool,
    ) -> None:
        self._denoise = denoise
        self._scale = scale
        unguided = bool((torch.as_tensor(scale) == 1).all())
        branches = [positive] if negative is None or unguided else [negative, positive]
        self._passes = [joined(branches)] if batched else branches
        self._branches = len(branches)

    def __call__(self, latents_NCTHW: Tensor, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the guided prediction (N, C, T, H, W) in the latents' dtype; the denoiser itself runs in `dtype`."""
        clips = len(latents_NCTHW)
        model_input = latents_NCTHW.to(dtype)
        predictions: list[Tensor] = []
        for inputs in self._passes:
            copies = self._branches // len(self._passes)
            prediction = self._denoise(_repeated(model_input, copies), timestep, inputs)
            predictions += torch.split(prediction.to(latents_NCTHW.dtype), clips)
        if len(predictions) == 1:
            return predictions[0]
        negative, positive = predictions
        return negative + self._scale * (positive - negative)


def joined(inputs: Sequence[TensorMap]) -> TensorMap:
    """Concatenate the inputs of branches, or of clips, along the first dimension, for one pass of the denoiser."""
    return {name: _joined([one[name] for one in inputs]) for name in inputs[0]}


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _repeated(latents_NCTHW: Tensor, copies: int) -> Tensor:
    """Repeat all clips `copies` times in the first dimension; a view for one clip or one repetition."""
    if len(latents_NCTHW) == 1:
        return latents_NCTHW.expand(copies, -1, -1, -1, -1)
    return _joined([latents_NCTHW] * copies)
