"""Predicting memory by running a model's own code on meta tensors: no weights, no values, no GPU."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import nn

from ..families import Architecture, Workload, family_of
from .meter import StorageMeter, fused_attention, rounded_bytes

META = torch.device("meta")


@lru_cache(maxsize=16)
def skeleton(architecture: Architecture, component: str, dtype: torch.dtype) -> nn.Module:
    """The component on the meta device, built once for a model and a precision."""
    with torch.device(META):
        module = family_of(architecture).skeleton(architecture, component)
        # Not `module.to`: diffusers' own warns of a cast that loses precision, of which there is none on meta.
        return nn.Module.to(module, dtype).requires_grad_(False)


@lru_cache(maxsize=64)
def weights_bytes(architecture: Architecture, component: str, dtype: torch.dtype) -> int:
    """Bytes of the component's parameters and buffers on the device, allocator rounding included."""
    module = skeleton(architecture, component, dtype)
    tensors = [*module.parameters(), *module.buffers()]
    return sum(rounded_bytes(tensor.numel() * tensor.element_size()) for tensor in tensors)


def activation_bytes(module: nn.Module, workload: Workload, dtype: torch.dtype) -> int:
    """Peak bytes of live tensors, weights left out, while the workload runs on the skeleton `module`."""
    with tracing() as meter:
        workload.run(module, META, dtype)
    return meter.peak_bytes


@contextmanager
def tracing() -> Generator[StorageMeter]:
    """Counts what is allocated on meta, with attention counted as a fused kernel allocates it."""
    with torch.no_grad(), StorageMeter(device_type="meta") as meter, fused_attention():
        yield meter
