"""Bringing a module to the device in the plan's precision, and giving it back exactly as it was."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn


@contextmanager
def placed(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Generator[nn.Module]:
    """The module with its parameters and buffers on `device`, floating ones in `dtype`, while the context lasts.

    The host's copies stay where they are and come back afterwards bit for bit, so nothing is copied back from the
    device and no rounding accumulates.
    """
    originals = [(tensor, tensor.data) for tensor in chain(module.parameters(), module.buffers())]
    try:
        for tensor, original in originals:
            target = dtype if original.is_floating_point() else original.dtype
            tensor.data = original.to(device=device, dtype=target)
        yield module
    finally:
        for tensor, original in originals:
            tensor.data = original
