"""Swapping the data of a module's tensors, and restoring it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def swapped(tensors: Sequence[Tensor], data: Sequence[Tensor]) -> Generator[None]:
    """Let the tensors hold `data` within the context, and their own data again afterwards."""
    before = [tensor.data for tensor in tensors]
    try:
        for tensor, other in zip(tensors, data, strict=True):
            tensor.data = other
        yield
    finally:
        for tensor, own in zip(tensors, before, strict=True):
            tensor.data = own


def all_tensors(module: nn.Module) -> list[Tensor]:
    """Return a module's parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Return a module's parameters and buffers without those of its submodules."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
