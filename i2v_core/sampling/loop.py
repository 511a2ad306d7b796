"""The sampling loop and guidance.

Shape legend: B guidance branches, C latent channels, T latent frames, H/W latent size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..families import TensorMap

# (latents_BCTHW, timestep, inputs) -> prediction_BCTHW
Denoise = Callable[[Tensor, Tensor, TensorMap], Tensor]


# Told after each step: its number from 1, and what the clean latents look like so far (1, C, T, H, W).
OnStep = Callable[[int, Tensor], None]


def sample_loop(
    predict: Callable[[Tensor, Tensor], Tensor], scheduler: Any, latents_BCTHW: Tensor, on_step: OnStep
) -> Tensor:
    """Denoise scaled noise (1, C, T, H, W) over the scheduler's timesteps. The state stays in the noise's own dtype."""
    for step, timestep in enumerate(scheduler.timesteps, start=1):
        prediction_BCTHW = predict(scheduler.scale_model_input(latents_BCTHW, timestep), timestep)
        result = scheduler.step(prediction_BCTHW, timestep, latents_BCTHW)
        latents_BCTHW = result.prev_sample
        on_step(step, getattr(result, "pred_original_sample", latents_BCTHW))
    return latents_BCTHW


class Guidance:
    """Classifier-free guidance (Ho and Salimans, 2022): negative + cfg · (positive − negative).

    Batched takes both branches in one pass of the denoiser; sequential takes two passes of half the memory.
    Without a negative branch, or at a cfg of 1, there is one branch only.
    """

    def __init__(
        self, denoise: Denoise, positive: TensorMap, negative: TensorMap | None, cfg: float, batched: bool
    ) -> None:
        self._denoise = denoise
        self._cfg = cfg
        branches = [positive] if negative is None or cfg == 1.0 else [negative, positive]
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
        return negative + self._cfg * (positive - negative)


def _concatenate(branches: list[TensorMap]) -> TensorMap:
    return {name: torch.cat([branch[name] for branch in branches]) for name in branches[0]}
