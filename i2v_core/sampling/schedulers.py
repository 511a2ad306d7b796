"""Diffusers schedulers, made from the model's own scheduler config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import BadInputError
from ..families import FAMILIES
from ..families.facts import AUTO_SCHEDULER, SchedulerChoice

_NAMES = dict.fromkeys(choice.name for family in FAMILIES.values() for choice in family.facts.schedulers)

SCHEDULERS: tuple[str, ...] = (AUTO_SCHEDULER, *_NAMES)
"""Names of the schedulers of all families (`FamilyFacts.scheduler`); the first chooses the family's default."""


def make_scheduler(choice: SchedulerChoice, config: Mapping[str, Any]) -> Any:
    """Create a diffusers scheduler with the model's noise schedule."""
    import diffusers

    cls: Any = getattr(diffusers, choice.diffusers_class)
    renamed = {new: config[old] for old, new in choice.renamed if old in config and new not in config}
    return cls.from_config({**config, **renamed, **dict(choice.changes)})


def init_noise_sigma(scheduler: Any) -> float:
    """Return the factor of the initial noise: 1 for flow-matching schedulers, which do not define one."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def scaled_input(scheduler: Any, latents_BCTHW: Tensor, timestep: Tensor) -> Tensor:
    """Return the latents scaled for the denoiser; unchanged by flow-matching schedulers, which define no scale."""
    scale = getattr(scheduler, "scale_model_input", None)
    return latents_BCTHW if scale is None else scale(latents_BCTHW, timestep)


def with_timesteps(scheduler: Any, steps: int) -> Any:
    """Set the scheduler's timesteps for a number of steps, and return it.

    Raises:
        BadInputError: the scheduler cannot take that many steps.
    """
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise BadInputError(
            f"{steps} steps are not possible with the model's scheduler ({error})", "use fewer steps"
        ) from error
    return scheduler
