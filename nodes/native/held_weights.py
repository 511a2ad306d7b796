"""Weights brought in or dequantised once for a layer call, however many chunks it runs in.

Core casts a layer's weights whenever the layer runs: moves them to the device, dequantises them, applies LoRA. In
chunks that would happen once a chunk. So the weights of a call are cast by core's own code before its first chunk, and
put in the layer's place until its last.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management as management
import comfy.ops
import torch
from torch import Tensor, nn

from ...i2v_core.chunking import LayerCall, LayerRunner
from .calls import nothing
from .quantised_layers import (
    has_functions,
    is_mixed_precision,
    is_packed,
    is_restored,
    multiplied_as_stored,
    quantises_input,
)

_DYNAMIC_MEMORY = "_v"
"""Attribute by which core finds a layer's weights in its dynamic memory, before it looks at the layer's own."""


class HeldWeightsRunner(LayerRunner):
    """Holds the weights of each layer call as its chunks will compute with them.

    Args:
        device: where the call runs.
        dtype: the precision of its activations.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype

    @contextmanager
    def enter(self, call: LayerCall) -> Generator[None]:
        with held(call.modules, self._device, self._dtype):
            yield


@contextmanager
def held(modules: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> Generator[None]:
    """Holds the weights of modules as calls of them, with inputs on a device and in a precision, compute with them."""
    with ExitStack() as stack:
        for layer in _layers(modules):
            if _is_cast(layer, device, dtype):
                stack.enter_context(_held(layer, device, dtype))
        yield


def _layers(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The layers that own weights, once each."""
    seen: set[int] = set()
    for module in modules:
        for layer in module.modules():
            if id(layer) not in seen and layer._parameters:
                seen.add(id(layer))
                yield layer


@dataclass(frozen=True, slots=True)
class _Cast:
    """A layer's weights as its calls compute with them."""

    weight: Tensor
    bias: Tensor | None
    release: Callable[[], None] = nothing
    """Gives back to core what it has lent."""


@contextmanager
def _held(layer: Any, device: torch.device, dtype: torch.dtype) -> Generator[None]:
    """Core's cast of a layer's weights in the place of its own."""
    as_stored = multiplied_as_stored(layer)
    cast = _cast(layer, device, dtype, as_stored=as_stored)
    attributes: dict[str, Any] = {"weight_function": [], "bias_function": []}
    if is_mixed_precision(layer) and not as_stored:
        attributes["comfy_force_cast_weights"] = True  # or core would take the weight for one in a quantised format
    tensors = {"weight": cast.weight, "bias": cast.bias}
    parameters = {name: nn.Parameter(it, requires_grad=False) for name, it in tensors.items() if it is not None}
    try:
        with (
            replaced(layer._parameters, parameters),
            replaced(layer.__dict__, attributes, hidden=_DYNAMIC_MEMORY),
        ):
            yield
    finally:
        cast.release()


def _is_cast(layer: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a call of the layer would move, dequantise or patch its weights."""
    weight = layer._parameters.get("weight")
    if weight is None or not isinstance(layer, comfy.ops.CastWeightBiasOp):
        return False
    if not (getattr(layer, "comfy_cast_weights", False) or has_functions(layer) or is_mixed_precision(layer)):
        return False
    if weight.device != device or has_functions(layer) or is_packed(layer):
        return True
    if multiplied_as_stored(layer):
        return quantises_input(layer) and weight.dtype != dtype
    return weight.dtype != dtype or is_restored(weight)


def _cast(layer: Any, device: torch.device, dtype: torch.dtype, *, as_stored: bool) -> _Cast:
    """The layer's weights, cast by its own code with the arguments of its own forward."""
    if is_packed(layer):
        weight, bias = layer.cast_bias_weight(dtype=dtype, device=device, bias_dtype=dtype)
        return _Cast(weight, bias)
    weight, bias, lent = comfy.ops.cast_bias_weight(
        layer,
        dtype=layer.weight.dtype if as_stored and not quantises_input(layer) else dtype,
        device=device,
        bias_dtype=dtype,
        offloadable=True,
        compute_dtype=_lora_dtype(layer, device, dtype, as_stored=as_stored),
        want_requant=as_stored,
    )
    cast = _kept(layer, weight, bias, lent)
    if as_stored or not is_restored(cast.weight):
        return cast
    return _Cast(cast.weight.dequantize(), cast.bias, cast.release)


def _lora_dtype(layer: Any, device: torch.device, dtype: torch.dtype, *, as_stored: bool) -> torch.dtype | None:
    """The precision in which core adds a LoRA to the layer's weight; None: that of the cast."""
    if is_mixed_precision(layer):
        return dtype
    return management.lora_compute_dtype(device) if as_stored else None


def _kept(layer: Any, weight: Tensor, bias: Tensor | None, lent: Any) -> _Cast:
    """A cast that stays valid while other layers are cast.

    Core brings weights in through a buffer of each of its few streams, which serves the next layer as soon as this one
    has run. A layer call holds more layers than there are streams, so it copies what lies in a buffer.
    """

    def release() -> None:
        comfy.ops.uncast_bias_weight(layer, weight, bias, lent)

    stream, source, bias_source = lent
    is_pinned = source is not None and not isinstance(source, Tensor)  # a page of core's dynamic memory, until release
    if stream is None or is_pinned:
        return _Cast(weight, bias, release)
    weight = weight.clone() if source is None or weight is source else weight
    if bias is not None and (source is None or bias is bias_source):
        bias = bias.clone()
    release()
    return _Cast(weight, bias)


@contextmanager
def replaced(values: Any, replacements: Mapping[str, Any], hidden: str | None = None) -> Generator[None]:
    """Entries of a dictionary replaced, and one left out, until the context ends."""
    names = [*replacements, *([hidden] if hidden else [])]
    before = {name: values[name] for name in names if name in values}
    values.update(replacements)
    if hidden:
        values.pop(hidden, None)
    try:
        yield
    finally:
        for name in names:
            if name not in before:
                values.pop(name, None)
        values.update(before)
