"""The sampling loop and guidance.

Shape legend: B guidance branches, C latent channels, T latent frames, H/W latent size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..families import TensorMap
from .schedulers import scaled_input
from .state import LoopState, SchedulerState

# (latents_BCTHW, timestep, inputs) -> prediction_BCTHW
Denoise = Callable[[Tensor, Tensor, TensorMap], Tensor]

# Told after each step: its number from 1, and what the clean latents look like so far (1, C, T, H, W).
OnStep = Callable[[int, Tensor], None]


class SampleLoop:
    """Denoises scaled noise (1, C, T, H, W) over the scheduler's timesteps, which have been set.

    The state stays in the noise's own dtype. A step that fails, whatever with, has not happened: `run` takes up from
    there, also with another `predict`.
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

    def run(
        self, predict: Callable[[Tensor, Tensor], Tensor], goes_on: Callable[[Tensor], bool] = lambda _: True
    ) -> Tensor:
        """The steps that are left, as long as `goes_on` says so of the next timestep; the latents then."""
        while (timestep := self.next_timestep) is not None and goes_on(timestep):
            scaled_BCTHW = scaled_input(self._scheduler, self.latents_BCTHW, timestep)
            clean_BCTHW = self._step(predict(scaled_BCTHW, timestep), timestep)
            self.steps_done += 1
            self._on_step(self.steps_done, clean_BCTHW)
        return self.latents_BCTHW

    @property
    def state(self) -> LoopState:
        """Where the loop is between two steps."""
        return LoopState(
            steps_done=self.steps_done, latents_BCTHW=self.latents_BCTHW, scheduler=self._history.changes()
        )

    def resume(self, state: LoopState) -> None:
        """Go on from the state of a loop with the same scheduler, timesteps and noise."""
        like = self.latents_BCTHW
        self.steps_done = state.steps_done
        self.latents_BCTHW = state.latents_BCTHW.to(like.device, like.dtype)
        self._history.restore(state.scheduler, like.device)

    def _step(self, prediction_BCTHW: Tensor, timestep: Tensor) -> Tensor:
        """One step of the scheduler, or none of it; the clean latents so far."""
        before = self._history.changes()
        try:
            result = self._scheduler.step(prediction_BCTHW, timestep, self.latents_BCTHW)
        except BaseException:
            # Multistep schedulers change their history before they can fail.
            self._history.restore(before, self.latents_BCTHW.device)
            raise
        self.latents_BCTHW = result.prev_sample
        return getattr(result, "pred_original_sample", self.latents_BCTHW)


class Guidance:
    """Classifier-free guidance (Ho and Salimans, 2022): negative + scale · (positive − negative).

    The scale is one number, or one for each frame (1, 1, T, 1, 1). Batched takes both branches in one pass of the
    denoiser; sequential takes two passes of half the memory. Without a negative branch, or at a scale of 1, there is
    one branch only.
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
        one = bool((torch.as_tensor(scale) == 1).all())
        branches = [positive] if negative is None or one else [negative, positive]
        self._passes = [_concatenate(branches)] if batched else branches
        self._branches = len(branches)

    def __call__(self, latents_BCTHW: Tensor, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """The guided prediction (1, C, T, H, W) in the latents' dtype; the denoiser itself runs in `dtype`."""
        model_input = latents_BCTHW.to(dtype)
        predictions: list[Tensor] = []
        for inputs in self._passes:
            copies = self._branches // len(self._passes)
            prediction = self._denoise(model_input.expand(copies, -1, -1, -1, -1), timestep, inputs)
            predictions += [branch[None] for branch in prediction.to(latents_BCTHW.dtype)]
        if len(predictions) == 1:
            return predictions[0]
        negative, positive = predictions
        return negative + self._scale * (positive - negative)


def _concatenate(branches: list[TensorMap]) -> TensorMap:
    return {name: torch.cat([branch[name] for branch in branches]) for name in branches[0]}
