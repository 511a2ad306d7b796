"""The noise schedule: v-prediction on a squared cosine, which ends in pure noise without rescaling.

The first sampling step therefore sees only the picture and the prompt, and decides the direction.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler

TRAIN_STEPS = 1000
# From this timestep on the noisy clip does not show the direction, so the model must decide it.
BLIND = 900


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def random_timesteps(count: int, generator: torch.Generator, blind: float = 0.3) -> torch.Tensor:
    """Draw timesteps (count,): the share `blind` from `BLIND` on, the rest anywhere."""
    everywhere = torch.randint(0, TRAIN_STEPS, (count,), generator=generator)
    late = torch.randint(BLIND, TRAIN_STEPS, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < blind, late, everywhere)


def image_latents(picture_BCHW: torch.Tensor, frames: int) -> torch.Tensor:
    """Build the denoiser's picture input (B, C, F, H, W): the latent, then constant planes that encode time."""
    planes = [picture_BCHW]
    planes += [torch.full_like(picture_BCHW, i / (frames - 1)) for i in range(1, frames)]
    return torch.stack(planes, dim=2)
