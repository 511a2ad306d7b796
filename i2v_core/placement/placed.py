"""Bringing a module to the device in the plan's precision, and giving it back exactly as it was."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from .precision import computing_dtypes
from .swap import all_tensors, swapped


@contextmanager
def placed(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Generator[nn.Module]:
    """The module with its parameters and buffers on `device`, floating ones in `dtype` (but for those that
    `computing_dtypes` keeps in fp32), while the context lasts.

    The host's copies stay where they are and come back afterwards bit for bit, so nothing is copied back from the
    device and no rounding accumulates.
    """
    tensors = all_tensors(module)
    dtype_of = computing_dtypes(module, dtype)
    copies = [tensor.data.to(device=device, dtype=dtype_of(tensor)) for tensor in tensors]
    with swapped(tensors, copies):
        yield module
