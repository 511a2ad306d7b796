"""Weights in host memory in the plan's precision, pinned where a GPU is to copy them without waiting."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..memory.meter import host_memory, rounded_bytes
from ..units import MIB
from .storage import StoredWeights
from .swap import all_tensors, swapped

# PyTorch rounds pinned allocations up to a power of two, so tensors share blocks of such a size.
_SLAB_BYTES = 256 * MIB


@contextmanager
def staged(module: nn.Module, weights: StoredWeights, *, pinned: bool) -> Generator[None]:
    """While the context lasts, parameters and buffers lie in host memory as `weights` says, and pinned if so wished.

    Afterwards the module holds its own tensors again, bit for bit. Takes host memory for all that lies in another
    precision than the module's own, and if pinned for everything.
    """
    tensors = all_tensors(module)
    lying = (_as_stored(tensor, weights) for tensor in tensors)
    with swapped(tensors, _pinned(lying) if pinned else list(lying)):
        yield


def _as_stored(tensor: Tensor, weights: StoredWeights) -> Tensor:
    reduced = weights.reduced(tensor)
    if reduced is not None or not tensor.is_floating_point():
        return tensor.data if reduced is None else reduced
    with host_memory():
        return tensor.data.to(weights.dtype_of(tensor))


def _pinned(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies in pinned memory, packed into slabs; a tensor larger than a slab has one of its own."""
    copies: list[Tensor] = []
    slab, used_bytes = torch.empty(0, dtype=torch.uint8), 0
    for tensor in tensors:
        if used_bytes + tensor.nbytes > slab.numel():
            with host_memory():
                slab = torch.empty(max(_SLAB_BYTES, tensor.nbytes), dtype=torch.uint8, pin_memory=True)
            used_bytes = 0
        copy = slab[used_bytes : used_bytes + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(copy.copy_(tensor))
        used_bytes += rounded_bytes(tensor.nbytes)
    return copies
