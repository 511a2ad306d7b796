"""Giving tensors of a module other data for a while."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def swapped(tensors: Sequence[Tensor], data: Sequence[Tensor]) -> Generator[None]:
    """While the context lasts, the tensors hold `data`; then their own again, bit for bit."""
    before = [tensor.data for tensor in tensors]
    try:
        for tensor, other in zip(tensors, data, strict=True):
            tensor.data = other
        yield
    finally:
        for tensor, own in zip(tensors, before, strict=True):
            tensor.data = own


def all_tensors(module: nn.Module) -> list[Tensor]:
    """A module's parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def own_tensors(module: nn.Module) -> list[Tensor]:
    """A module's parameters and buffers without those of its submodules."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
