"""Tensors of the device's that wait in host memory."""

from __future__ import annotations

import torch

from .meter import host_memory


def empty_parked(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor in host memory for what belongs on `device`; pinned for a CUDA device.

    For meta tensors, which have no memory, it is one of them.
    """
    with host_memory():
        return torch.empty(
            shape,
            dtype=dtype,
            device="meta" if device.type == "meta" else "cpu",
            pin_memory=device.type == "cuda" and torch.cuda.is_available(),  # fake CUDA tensors come without CUDA too
        )


def fetch(parked: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, in order with the other work of its stream."""
    return torch.empty_like(parked, device=device).copy_(parked, non_blocking=device.type == "cuda")
