"""Bytes of a component's weights on the device, as they lie and as a layer call computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..memory.meter import rounded_bytes
from ..placement.storage import WeightStorage, reducible
from ..placement.swap import all_tensors
from .trace import TracedCall


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleWeights:
    """Weights of a component that runs layer by layer.

    `lying_bytes` are those of all weights, `scale_bytes` those of the scales of what lies in 8 bits, which stay on the
    device; `calls` has what each layer call needs.
    """

    lying_bytes: int
    scale_bytes: int
    calls: tuple[CallWeights, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallWeights:
    """Weights of one layer call.

    `lying_bytes` as they lie, `computing_bytes` as the layer computes with them, `restored_bytes` the share of that
    which is made for the call. `restoring_bytes` is the most while they are restored one after another, each giving up
    what it lay in.
    """

    lying_bytes: int
    computing_bytes: int
    restored_bytes: int
    restoring_bytes: int


@lru_cache(maxsize=256)
def module_weights(
    module: nn.Module, storage: WeightStorage, calls: tuple[tuple[nn.Module, ...], ...]
) -> ModuleWeights:
    """`module` is the denoiser's skeleton in the precision of computation, `calls` the parts of each layer call."""
    reduced: frozenset[Tensor] = frozenset() if storage is WeightStorage.AS_COMPUTED else frozenset(reducible(module))
    return ModuleWeights(
        lying_bytes=sum(_lying_bytes(tensor, reduced) for tensor in all_tensors(module)),
        scale_bytes=rounded_bytes(sum(len(weight) for weight in reduced) * torch.float32.itemsize),
        calls=tuple(_call_weights(modules, reduced) for modules in calls),
    )


def _call_weights(modules: tuple[nn.Module, ...], reduced: frozenset[Tensor]) -> CallWeights:
    tensors = [tensor for module in modules for tensor in all_tensors(module)]
    restored = [rounded_bytes(tensor.nbytes) if tensor in reduced else 0 for tensor in tensors]
    lying = [_lying_bytes(tensor, reduced) for tensor in tensors]
    held_bytes = most_bytes = sum(lying)
    for restored_bytes, lying_bytes in zip(restored, lying, strict=True):
        if restored_bytes:
            most_bytes = max(most_bytes, held_bytes + restored_bytes)
            held_bytes += restored_bytes - lying_bytes
    return CallWeights(
        lying_bytes=sum(lying),
        computing_bytes=held_bytes,
        restored_bytes=sum(restored),
        restoring_bytes=most_bytes,
    )


def _lying_bytes(tensor: Tensor, reduced: frozenset[Tensor]) -> int:
    return rounded_bytes(tensor.numel() if tensor in reduced else tensor.nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What is on the device at one time of a denoiser pass."""

    weights_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.activation_bytes


def highest_moment(
    calls: Sequence[TracedCall], weights: ModuleWeights, *, streamed: bool, passes: int | None = None
) -> Moment:
    """The peak of a pass: with all weights in place, or streamed with those of a call and of the one after it, which a
    stream that takes one pass only cannot foresee.
    """
    moments: list[Moment] = []
    following = (*weights.calls[1:], weights.calls[0])
    for call, own, after in zip(calls, weights.calls, following, strict=True):
        if streamed:
            restoring_bytes = weights.scale_bytes + own.restoring_bytes
            moments.append(Moment(weights_bytes=restoring_bytes, activation_bytes=call.before_bytes))
            ahead_bytes = 0 if passes == 1 else after.lying_bytes
            weights_bytes = weights.scale_bytes + own.computing_bytes + ahead_bytes
        else:
            weights_bytes = weights.scale_bytes + weights.lying_bytes + own.restored_bytes
        moments.append(Moment(weights_bytes=weights_bytes, activation_bytes=call.activation_bytes))
    return max(moments, key=lambda moment: moment.total_bytes)
