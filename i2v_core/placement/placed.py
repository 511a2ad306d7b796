"""Placing a module on a device in the plan's precision, and restoring it exactly."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from .precision import compute_dtypes
from .swap import all_tensors, swapped


@contextmanager
def placed(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Generator[nn.Module]:
    """Place the module's parameters and buffers on `device` within the context.

    Floating ones are in `dtype`, but for those that `compute_dtypes` keeps in fp32. The host's copies stay where they
    are and are restored afterwards bit for bit, so nothing is copied back and no rounding accumulates.
    """
    tensors = all_tensors(module)
    dtype_of = compute_dtypes(module, dtype)
    copies = [tensor.data.to(device=device, dtype=dtype_of(tensor)) for tensor in tensors]
    with swapped(tensors, copies):
        yield module
