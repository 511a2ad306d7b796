"""Tensors in host memory that belong to a device: offloaded to be used again, or results."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..memory.meter import host_memory


def empty_offloaded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an empty tensor in host memory for data that is to return to `device`; pinned for a CUDA device.

    For the meta device, whose tensors have no memory, it is a meta tensor.
    """
    with host_memory():
        return torch.empty(
            shape,
            dtype=dtype,
            device=_host_of(device),
            pin_memory=device.type == "cuda" and torch.cuda.is_available(),  # fake CUDA tensors come without CUDA too
        )


def empty_on_host(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an empty tensor in unpinned host memory, for inputs and results of `device` that may be kept for long."""
    with host_memory():
        return torch.empty(shape, dtype=dtype, device=_host_of(device))


def fp32_host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in fp32 in unpinned host memory."""
    with host_memory():
        return torch.empty_like(tensor, device=_host_of(tensor.device), dtype=torch.float32).copy_(tensor)


def onload(offloaded: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on the device, made in order with the other work of its stream."""
    return torch.empty_like(offloaded, device=device).copy_(offloaded, non_blocking=device.type == "cuda")


def release_pinned_memory() -> None:
    """Return unused pinned host memory to the system; PyTorch's allocator would keep it."""
    # PyTorch 2.11 has no public name for it; versions before 2.5 have none at all.
    empty_cache: Callable[[], None] | None = getattr(torch._C, "_host_emptyCache", None)  # pyright: ignore[reportPrivateUsage]
    if empty_cache is not None:
        empty_cache()


def _host_of(device: torch.device) -> torch.device:
    return device if device.type == "meta" else torch.device("cpu")
