"""Weights in host memory in the plan's precision, pinned where a GPU is to copy them without waiting."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..memory.meter import host_memory, rounded_bytes
from ..units import MIB
from .swap import all_tensors, swapped

# PyTorch rounds pinned allocations up to a power of two, so tensors share blocks of such a size.
_SLAB_BYTES = 256 * MIB


@contextmanager
def staged(module: nn.Module, dtype: torch.dtype, *, pinned: bool) -> Generator[None]:
    """While the context lasts, floating parameters and buffers are in `dtype`, and pinned if so wished.

    Afterwards the module holds its own tensors again, bit for bit. Takes as much host memory again as the module's
    weights, except where neither precision nor pinning asks for a copy.
    """
    tensors = all_tensors(module)
    originals = [tensor.data for tensor in tensors]
    with host_memory():
        copies = _pinned(originals, dtype) if pinned else [_cast(original, dtype) for original in originals]
    with swapped(tensors, copies):
        yield


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _pinned(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in pinned memory, packed into slabs; a tensor larger than a slab has one of its own."""
    copies: list[Tensor] = []
    slab, used_bytes = torch.empty(0, dtype=torch.uint8), 0
    for tensor in tensors:
        target = dtype if tensor.is_floating_point() else tensor.dtype
        size_bytes = tensor.numel() * target.itemsize
        if used_bytes + size_bytes > slab.numel():
            slab = torch.empty(max(_SLAB_BYTES, size_bytes), dtype=torch.uint8, pin_memory=True)
            used_bytes = 0
        copy = slab[used_bytes : used_bytes + size_bytes].view(target).view(tensor.shape)
        copies.append(copy.copy_(tensor))
        used_bytes += rounded_bytes(size_bytes)
    return copies
