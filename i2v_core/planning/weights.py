"""Bytes of a component's weights on the device, as they lie and as a layer call computes with them."""

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
    """Weights of a component that runs layer by layer.

    `stored_bytes` are those of all weights, `scale_bytes` those of the scales of what lies in 8 bits, which stay on the
    device; `calls` has what each layer call needs.
    """

    stored_bytes: int
    scale_bytes: int
    calls: tuple[CallWeights, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallWeights:
    """Weights of one layer call.

    `stored_bytes` as they lie, `computing_bytes` as the layer computes with them, `restored_bytes` the share of that
    which is made for the call. `restoring_bytes` is the most while they are restored one after another, each giving up
    what it lay in; `scratch_bytes` what restoring one of them takes at most, beside what it lay in and its result.
    """

    stored_bytes: int
    computing_bytes: int
    dequantized_bytes: int
    dequantizing_bytes: int
    scratch_bytes: int


@lru_cache(maxsize=256)
def module_weights(
    module: nn.Module, storage: WeightStorage, calls: tuple[tuple[nn.Module, ...], ...]
) -> ModuleWeights:
    """`module` is the denoiser's skeleton in the precision of computation, `calls` the parts of each layer call."""
    reduced: frozenset[Tensor] = frozenset() if storage is WeightStorage.AS_COMPUTED else frozenset(reducible(module))
    forms = _Forms(reduced=reduced, quantized=quantized_weights(module))
    return ModuleWeights(
        stored_bytes=sum(forms.stored_bytes(tensor) for tensor in all_tensors(module)),
        scale_bytes=rounded_bytes(sum(len(weight) for weight in reduced) * torch.float32.itemsize),
        calls=tuple(_call_weights(modules, forms) for modules in calls),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Forms:
    """What does not lie as it is computed with: in 8 bits by the plan's choice, or quantised in a file."""

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


def _call_weights(modules: tuple[nn.Module, ...], forms: _Forms) -> CallWeights:
    tensors = [tensor for module in modules for tensor in all_tensors(module)]
    held_bytes = most_bytes = sum(forms.stored_bytes(tensor) for tensor in tensors)
    stored_bytes = held_bytes
    for tensor in tensors:
        if restored_bytes := forms.dequantized_bytes(tensor):
            most_bytes = max(most_bytes, held_bytes + restored_bytes + forms.scratch_bytes(tensor))
            held_bytes += restored_bytes - forms.stored_bytes(tensor)
    return CallWeights(
        stored_bytes=stored_bytes,
        computing_bytes=held_bytes,
        dequantized_bytes=sum(forms.dequantized_bytes(tensor) for tensor in tensors),
        dequantizing_bytes=most_bytes,
        scratch_bytes=max((forms.scratch_bytes(tensor) for tensor in tensors), default=0),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakUsage:
    """What is on the device at one time of a denoiser pass."""

    weights_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.activation_bytes


def peak_usage(
    calls: Sequence[TracedCall], weights: ModuleWeights, *, streamed: bool, passes: int | None = None
) -> PeakUsage:
    """The peak of a pass: with all weights in place, or streamed with those of a call and of the one after it, which a
    stream that takes one pass only cannot foresee.
    """
    moments: list[PeakUsage] = []
    following = (*weights.calls[1:], weights.calls[0])
    for call, own, after in zip(calls, weights.calls, following, strict=True):
        if streamed:
            restoring_bytes = weights.scale_bytes + own.dequantizing_bytes
            moments.append(PeakUsage(weights_bytes=restoring_bytes, activation_bytes=call.before_bytes))
            ahead_bytes = 0 if passes == 1 else after.stored_bytes
            weights_bytes = weights.scale_bytes + own.computing_bytes + ahead_bytes
        else:
            weights_bytes = weights.scale_bytes + weights.stored_bytes + own.dequantized_bytes
            restoring_bytes = weights_bytes + own.scratch_bytes
            moments.append(PeakUsage(weights_bytes=restoring_bytes, activation_bytes=call.before_bytes))
        moments.append(PeakUsage(weights_bytes=weights_bytes, activation_bytes=call.activation_bytes))
    return max(moments, key=lambda moment: moment.total_bytes)
