"""The UNet's skip connections, each kept from where it is made to where it is used, and no longer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..placement.offload import empty_offloaded, fetch


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """A skip connection (N, C, H, W); `parked`: its tensor lies in host memory."""

    tensor: torch.Tensor
    offloaded: bool

    def chunk(self, frames: slice, device: torch.device) -> torch.Tensor:
        """Some of its frames, on the device: a view, or a copy of what is parked."""
        if not self.offloaded:
            return self.tensor[frames]
        return fetch(self.tensor[frames], device)


class Skips:
    """A stack of skip connections, on the device or parked in host memory."""

    def __init__(self, *, park: bool) -> None:
        self._park = park
        self._stack: list[Skip] = []

    def push(self, hidden: torch.Tensor) -> None:
        self._stack.append(Skip(tensor=_parked(hidden) if self._park else hidden, offloaded=self._park))

    def pop(self) -> Skip:
        return self._stack.pop()

    def hold(self, hidden: torch.Tensor) -> bool:
        """Whether `hidden` is itself a skip connection that waits, so that it must not be overwritten."""
        return any(skip.tensor is hidden for skip in self._stack)


def _parked(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory. From CUDA it is asynchronous, in order with the other work of the stream."""
    parked = empty_offloaded(tuple(tensor.shape), tensor.dtype, tensor.device)
    return parked.copy_(tensor, non_blocking=tensor.device.type == "cuda")
