"""The schedulers on offer, as diffusers has them, made from the model's own scheduler config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BadInputError

# Names as users of the host know them; none of these draws noise of its own, so a seed always gives the same video.
SCHEDULERS: dict[str, str] = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A fresh diffusers scheduler of the model's noise schedule.

    Raises:
        BadInputError: no such scheduler.
    """
    if name not in SCHEDULERS:
        raise BadInputError(f"'{name}' is no scheduler", f"choose one of {', '.join(SCHEDULERS)}")
    import diffusers

    cls: Any = getattr(diffusers, SCHEDULERS[name])
    return cls.from_config(dict(config))


def with_timesteps(scheduler: Any, steps: int) -> Any:
    """The scheduler, ready for so many steps.

    Raises:
        BadInputError: it cannot take as many.
    """
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise BadInputError(
            f"{steps} steps are not possible with the model's scheduler ({error})", "use fewer steps"
        ) from error
    return scheduler
