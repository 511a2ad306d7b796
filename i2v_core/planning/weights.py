"""Bytes of a component's weights on the device, as they are stored and as a layer call computes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..memory.meter import rounded_bytes
from ..placement.quantized import Quantized, quantized_weights
from ..placement.storage import WeightStorage, reducible
from ..placement.swap import all_tensors
from .trace import TracedCall


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleWeights:
    """Weights of a component that runs layer by layer."""

    stored_bytes: int
    """All weights in their storage format."""

    scale_bytes: int
    """Scales of the weights that a plan stores in 8 bits, which stay on the device."""

    calls: tuple[CallWeights, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallWeights:
    """Weights of one layer call."""

    stored_bytes: int
    """In their storage format."""

    computing_bytes: int
    """In the precision of computation: dequantized weights, and those that are stored so."""

    dequantized_bytes: int
    """The part of `computing_bytes` that is made for the call."""

    dequantizing_bytes: int
    """The peak while weights are dequantized one after another, each then giving up its stored form."""

    scratch_bytes: int
    """The most that dequantizing one weight needs beside its stored form and the result."""


@lru_cache(maxsize=256)
def module_weights(
    module: nn.Module, storage: WeightStorage, calls: tuple[tuple[nn.Module, ...], ...]
) -> ModuleWeights:
    """Weights of a skeleton in the precision of computation; `calls` has the modules of each layer call."""
    reduced: frozenset[Tensor] = frozenset() if storage is WeightStorage.AS_COMPUTED else frozenset(reducible(module))
    formats = _StorageFormats(reduced=reduced, quantized=quantized_weights(module))
    return ModuleWeights(
        stored_bytes=sum(formats.stored_bytes(tensor) for tensor in all_tensors(module)),
        scale_bytes=rounded_bytes(sum(len(weight) for weight in reduced) * torch.float32.itemsize),
        calls=tuple(_call_weights(modules, formats) for modules in calls),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _StorageFormats:
    """Weights that are dequantized for a call: stored in 8 bits by the plan's choice, or quantized in a file."""

    reduced: frozenset[Tensor]
    quantized: Mapping[Tensor, Quantized]

    def stored_bytes(self, tensor: Tensor) -> int:
        if tensor in self.quantized:
            return rounded_bytes(self.quantized[tensor].stored_bytes)
        return rounded_bytes(tensor.numel() if tensor in self.reduced else tensor.nbytes)

    def dequantized_bytes(self, tensor: Tensor) -> int:
        return rounded_bytes(tensor.nbytes) if tensor in self.reduced or tensor in self.quantized else 0

    def scratch_bytes(self, tensor: Tensor) -> int:
        return self.quantized[tensor].dequantizing_bytes if tensor in self.quantized else 0


def _call_weights(modules: tuple[nn.Module, ...], formats: _StorageFormats) -> CallWeights:
    tensors = [tensor for module in modules for tensor in all_tensors(module)]
    held_bytes = peak_bytes = sum(formats.stored_bytes(tensor) for tensor in tensors)
    stored_bytes = held_bytes
    for tensor in tensors:
        if dequantized_bytes := formats.dequantized_bytes(tensor):
            peak_bytes = max(peak_bytes, held_bytes + dequantized_bytes + formats.scratch_bytes(tensor))
            held_bytes += dequantized_bytes - formats.stored_bytes(tensor)
    return CallWeights(
        stored_bytes=stored_bytes,
        computing_bytes=held_bytes,
        dequantized_bytes=sum(formats.dequantized_bytes(tensor) for tensor in tensors),
        dequantizing_bytes=peak_bytes,
        scratch_bytes=max((formats.scratch_bytes(tensor) for tensor in tensors), default=0),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakUsage:
    """Device memory at the highest moment of a pass."""

    weights_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.activation_bytes


def peak_usage(
    calls: Sequence[TracedCall], weights: ModuleWeights, *, streamed: bool, passes: int | None = None
) -> PeakUsage:
    """The peak of a pass with all weights on the device, or streamed.

    Streamed weights are those of a call and, prefetched, of the next one. The order is not known in the first pass:
    with `passes=1` nothing is prefetched.
    """
    moments: list[PeakUsage] = []
    following = (*weights.calls[1:], weights.calls[0])
    for call, own, after in zip(calls, weights.calls, following, strict=True):
        if streamed:
            dequantizing_bytes = weights.scale_bytes + own.dequantizing_bytes
            prefetched_bytes = 0 if passes == 1 else after.stored_bytes
            computing_bytes = weights.scale_bytes + own.computing_bytes + prefetched_bytes
        else:
            computing_bytes = weights.scale_bytes + weights.stored_bytes + own.dequantized_bytes
            dequantizing_bytes = computing_bytes + own.scratch_bytes
        moments.append(PeakUsage(weights_bytes=dequantizing_bytes, activation_bytes=call.before_bytes))
        moments.append(PeakUsage(weights_bytes=computing_bytes, activation_bytes=call.activation_bytes))
    return max(moments, key=lambda moment: moment.total_bytes)
