"""A UNet's skip connections, each kept from the block that makes it to the block that uses it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..placement.offload import empty_offloaded, onload


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """A skip connection (N, C, H, W); the tensor of an offloaded one is in host memory."""

    tensor: torch.Tensor
    offloaded: bool

    def chunk(self, frames: slice, device: torch.device) -> torch.Tensor:
        """Return some frames on the device: a view, or a copy where the skip connection is offloaded."""
        if not self.offloaded:
            return self.tensor[frames]
        return onload(self.tensor[frames], device)


class Skips:
    """A stack of skip connections, on the device or offloaded to host memory."""

    def __init__(self, *, offload: bool) -> None:
        self._offload = offload
        self._stack: list[Skip] = []

    def push(self, hidden: torch.Tensor) -> None:
        self._stack.append(Skip(tensor=_offloaded_copy(hidden) if self._offload else hidden, offloaded=self._offload))

    def pop(self) -> Skip:
        return self._stack.pop()

    def holds(self, hidden: torch.Tensor) -> bool:
        """Whether `hidden` is a skip connection that is still needed, and so must not be overwritten."""
        return any(skip.tensor is hidden for skip in self._stack)


def _offloaded_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in host memory. From CUDA it is asynchronous, in order with the other work of the stream."""
    offloaded = empty_offloaded(tuple(tensor.shape), tensor.dtype, tensor.device)
    return offloaded.copy_(tensor, non_blocking=tensor.device.type == "cuda")
