"""Bringing a module to the device in the plan's precision, and giving it back exactly as it was."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from .swap import all_tensors, swapped


@contextmanager
def placed(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Generator[nn.Module]:
    """The module with its parameters and buffers on `device`, floating ones in `dtype`, while the context lasts.

    The host's copies stay where they are and come back afterwards bit for bit, so nothing is copied back from the
    device and no rounding accumulates.
    """
    tensors = all_tensors(module)
    copies = [
        tensor.data.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype) for tensor in tensors
    ]
    with swapped(tensors, copies):
        yield module
