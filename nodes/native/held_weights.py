"""Weights brought in or dequantised once for a layer call, however many chunks it runs in.

Core casts a layer's weights whenever the layer runs: moves them to the device, dequantises them, applies LoRA. In
chunks that would happen once a chunk. So the weights of a call are cast by core's own code before its first chunk, and
put in the layer's place until its last.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.ops
import torch
from torch import nn

from ...i2v_core.chunking import LayerCall, LayerRunner

_FUNCTIONS = ("weight_function", "bias_function")
"""Names of a layer's lists of what core applies to its weights as it casts them, such as a LoRA."""


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
        with ExitStack() as stack:
            for module in _layers(call.modules):
                stack.enter_context(_held(module, self._device, self._dtype))
            yield


def _layers(modules: tuple[nn.Module, ...]) -> Iterator[nn.Module]:
    """The layers that own weights, once each."""
    seen: set[int] = set()
    for module in modules:
        for layer in module.modules():
            if id(layer) not in seen and layer._parameters:
                seen.add(id(layer))
                yield layer


@contextmanager
def _held(layer: Any, device: torch.device, dtype: torch.dtype) -> Generator[None]:
    """Core's cast of a layer's weights in the place of its own, where core would cast them."""
    if not _is_cast(layer, device, dtype):
        yield
        return
    weight, bias, release = _cast(layer, device, dtype)
    attributes: dict[str, Any] = {name: [] for name in _FUNCTIONS}
    if _is_quantised(layer) and _multiplies_dequantised(layer):
        attributes["comfy_force_cast_weights"] = True  # otherwise the layer would quantise its inputs
    parameters = {name: layer._parameters.get(name) for name in ("weight", "bias")}
    before = {name: layer.__dict__[name] for name in attributes if name in layer.__dict__}
    try:
        layer._parameters["weight"] = _parameter(weight)
        if bias is not None:
            layer._parameters["bias"] = _parameter(bias)
        layer.__dict__.update(attributes)
        yield
    finally:
        layer._parameters.update({name: it for name, it in parameters.items() if it is not None})
        for name in attributes:
            del layer.__dict__[name]
        layer.__dict__.update(before)
        release()


def _is_cast(layer: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a call of the layer would move, dequantise or patch its weights."""
    weight = layer._parameters.get("weight")
    if weight is None or not isinstance(layer, comfy.ops.CastWeightBiasOp):
        return False
    if _is_quantised(layer):  # multiplied as it is stored, only a copy to the device can be saved
        return _multiplies_dequantised(layer) or weight.device != device
    has_functions = any(getattr(layer, name, None) for name in _FUNCTIONS)
    casts = getattr(layer, "comfy_cast_weights", False) or has_functions
    return bool(casts) and (weight.device != device or weight.dtype != dtype or has_functions or _is_packed(layer))


def _is_quantised(layer: Any) -> bool:
    """Whether the weight is stored in one of core's own quantised formats."""
    return getattr(layer, "quant_format", None) is not None


def _multiplies_dequantised(layer: Any) -> bool:
    """Whether a quantised layer of core's dequantises its weight for each call."""
    reasons = ("_full_precision_mm", "comfy_force_cast_weights", *_FUNCTIONS)
    return any(getattr(layer, name, None) for name in reasons)


def _is_packed(layer: Any) -> bool:
    """Whether the weight is stored in a format of its own (GGUF), whatever dtype it names."""
    return hasattr(layer, "is_ggml_quantized") and bool(layer.is_ggml_quantized())


def _cast(layer: Any, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """The layer's weight and bias by its own cast, and what gives them back."""
    if hasattr(layer, "is_ggml_quantized"):
        weight, bias = layer.cast_bias_weight(dtype=dtype, device=device, bias_dtype=dtype)
        return weight, bias, lambda: None
    as_stored = _is_quantised(layer) and not _multiplies_dequantised(layer)
    weight, bias, stream = comfy.ops.cast_bias_weight(
        layer,
        dtype=layer.weight.dtype if as_stored else dtype,
        device=device,
        bias_dtype=dtype,
        offloadable=True,
        want_requant=as_stored,
    )
    return weight, bias, lambda: comfy.ops.uncast_bias_weight(layer, weight, bias, stream)


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
