"""Tensors of the device's that wait in host memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..memory.meter import host_memory


def empty_offloaded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor in host memory for what goes back to `device`; pinned for a CUDA device.

    For meta tensors, which have no memory, it is one of them.
    """
    with host_memory():
        return torch.empty(
            shape,
            dtype=dtype,
            device=_host_of(device),
            pin_memory=device.type == "cuda" and torch.cuda.is_available(),  # fake CUDA tensors come without CUDA too
        )


def empty_on_host(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As `empty_parked`, for what `device` is given or gives away: others keep that, so it is not pinned."""
    with host_memory():
        return torch.empty(shape, dtype=dtype, device=_host_of(device))


def kept_on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in fp32 in host memory, of what the device has no more need for."""
    with host_memory():
        return torch.empty_like(tensor, device=_host_of(tensor.device), dtype=torch.float32).copy_(tensor)


def fetch(parked: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, in order with the other work of its stream."""
    return torch.empty_like(parked, device=device).copy_(parked, non_blocking=device.type == "cuda")


def give_pinned_back() -> None:
    """Hand pinned host memory that is in nobody's use back to the system, which PyTorch's allocator would keep."""
    # PyTorch 2.11 has no public name for it; versions before 2.5 have none at all.
    empty_cache: Callable[[], None] | None = getattr(torch._C, "_host_emptyCache", None)  # pyright: ignore[reportPrivateUsage]
    if empty_cache is not None:
        empty_cache()


def _host_of(device: torch.device) -> torch.device:
    return device if device.type == "meta" else torch.device("cpu")
