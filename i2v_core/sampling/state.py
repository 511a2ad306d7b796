"""State of a sampling loop between two steps: everything that the remaining steps depend on.

Shape legend: C latent channels, T latent frames, H/W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, cast

import torch
from torch import Tensor

Scalar: TypeAlias = "bool | int | float | str | None"
# Values of a scheduler's attributes: the outputs of earlier steps, its position, its current order.
SchedulerValue: TypeAlias = "Scalar | Tensor | list[Scalar | Tensor]"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopState:
    """State of a `SampleLoop` after a number of steps."""

    steps_done: int

    latents_BCTHW: Tensor
    """(1, C, T, H, W), in the loop's dtype."""

    scheduler: Mapping[str, SchedulerValue]
    """The scheduler's attributes that the steps have changed, by name."""

    def on_host(self) -> LoopState:
        """Return the same state with all tensors in host memory."""
        host = torch.device("cpu")
        scheduler = {name: cast("SchedulerValue", _on(value, host)) for name, value in self.scheduler.items()}
        return replace(self, latents_BCTHW=self.latents_BCTHW.to(host), scheduler=scheduler)


class SchedulerState:
    """Saves and restores what steps change in a diffusers scheduler.

    Schedulers of diffusers have no `state_dict`: multistep ones keep outputs of earlier steps in plain attributes. The
    state is therefore every attribute that differs from before the first step, which works for any scheduler without a
    list of its attributes.
    """

    def __init__(self, scheduler: object) -> None:
        """Take a scheduler whose timesteps are set and that has taken no step."""
        self._attributes: dict[str, object] = vars(scheduler)
        self._fresh = {name: _copied(value) for name, value in self._attributes.items()}

    def changes(self) -> dict[str, SchedulerValue]:
        return {
            name: cast("SchedulerValue", _copied(value))
            for name, value in self._attributes.items()
            if name not in self._fresh or not _same(value, self._fresh[name])
        }

    def restore(self, changes: Mapping[str, SchedulerValue], device: torch.device) -> None:
        """Put the scheduler back to the state that `changes` returned; moves tensors to `device`."""
        for name in [name for name in self._attributes if name not in self._fresh]:
            del self._attributes[name]
        self._attributes.update({name: _copied(value) for name, value in self._fresh.items()})
        self._attributes.update({name: _on(value, device) for name, value in changes.items()})


def _copied(value: object) -> object:
    """Copy lists, which schedulers change in place; their items, and tensors, are replaced but never changed."""
    return list(cast("Sequence[object]", value)) if isinstance(value, list) else value


def _same(one: object, other: object) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        ones, others = cast("list[object]", one), cast("list[object]", other)
        return len(ones) == len(others) and all(map(_same, ones, others))
    simple = (bool, int, float, str)
    return one is other or (isinstance(one, simple) and isinstance(other, simple) and one == other)


def _on(value: SchedulerValue, device: torch.device) -> object:
    if isinstance(value, list):
        return [_on(it, device) for it in value]
    # Timesteps stay where they are: schedulers index with them. Unlike latents they have no dimensions.
    return value.to(device) if isinstance(value, Tensor) and value.ndim else value
