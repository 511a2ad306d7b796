"""Where a sampling loop is between two steps: everything that the steps to come depend on.

Shape legend: C latent channels, T latent frames, H/W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, cast

import torch
from torch import Tensor

Scalar: TypeAlias = "bool | int | float | str | None"
# What a scheduler remembers: the outputs of earlier steps, where it is, and what order it has come to.
Remembered: TypeAlias = "Scalar | Tensor | list[Scalar | Tensor]"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopState:
    """`latents_BCTHW` (1, C, T, H, W) after so many steps, and what the scheduler remembers of them, by attribute."""

    steps_done: int
    latents_BCTHW: Tensor
    scheduler: Mapping[str, Remembered]

    def on_host(self) -> LoopState:
        """The same, with nothing on a device."""
        host = torch.device("cpu")
        scheduler = {name: cast("Remembered", _on(value, host)) for name, value in self.scheduler.items()}
        return replace(self, latents_BCTHW=self.latents_BCTHW.to(host), scheduler=scheduler)


class SchedulerState:
    """What steps change of a diffusers scheduler, found by comparison with what it is like before the first.

    diffusers' schedulers have no state of their own to ask for: multistep ones keep it in attributes. Here it is all
    those that have changed, so that a scheduler needs no list of its attributes.
    """

    def __init__(self, scheduler: object) -> None:
        """`scheduler` has had its timesteps set, and has taken no step."""
        self._attributes: dict[str, object] = vars(scheduler)
        self._fresh = {name: _copied(value) for name, value in self._attributes.items()}

    def changes(self) -> dict[str, Remembered]:
        return {
            name: cast("Remembered", _copied(value))
            for name, value in self._attributes.items()
            if name not in self._fresh or not _same(value, self._fresh[name])
        }

    def restore(self, changes: Mapping[str, Remembered], device: torch.device) -> None:
        """The scheduler as it was when the changes were asked for; tensors come to `device`."""
        for name in [name for name in self._attributes if name not in self._fresh]:
            del self._attributes[name]
        self._attributes.update({name: _copied(value) for name, value in self._fresh.items()})
        self._attributes.update({name: _on(value, device) for name, value in changes.items()})


def _copied(value: object) -> object:
    """Lists are changed in place, by the schedulers that have them; what is in them is not."""
    return list(cast("Sequence[object]", value)) if isinstance(value, list) else value


def _same(one: object, other: object) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        ones, others = cast("list[object]", one), cast("list[object]", other)
        return len(ones) == len(others) and all(map(_same, ones, others))
    simple = (bool, int, float, str)
    return one is other or (isinstance(one, simple) and isinstance(other, simple) and one == other)


def _on(value: Remembered, device: torch.device) -> object:
    if isinstance(value, list):
        return [_on(it, device) for it in value]
    # Timesteps stay where they are: they are told apart from latents by having no dimensions.
    return value.to(device) if isinstance(value, Tensor) and value.ndim else value
