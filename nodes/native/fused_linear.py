"""Some outputs of a linear layer that makes several tensors at once, such as query, key and value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.ops
import torch.nn.functional as F
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from .held_weights import replaced
from .model import is_own_method
from .quantised_layers import has_functions

_SLICEABLE_FORMATS = {"float8_e4m3fn": 1, "float8_e5m2": 1, "int8_tensorwise": 1, "mxfp8": 128, "nvfp4": 128}
"""Core's quantised formats of which rows can be taken, with the number of rows whose scales are stored together."""

_BARE = (nn.Linear, comfy.ops.disable_weight_init.Linear, comfy.ops.manual_cast.Linear)
"""Classes whose forward does no more than multiply by a weight that is held."""


def linear_rows(layer: Any, inputs: Tensor, rows: slice) -> Tensor:
    """Outputs `rows` of `layer(inputs)`; see `linear_parts`."""
    (made,) = linear_parts(layer, inputs, rows)
    return made


def linear_parts(layer: Any, inputs: Tensor, *parts: slice) -> tuple[Tensor, ...]:
    """Some outputs of `layer(inputs)`, a tensor for each of `parts`, without the others where the weight allows it.

    To be called while the layer's weights are held (`calls.CallState.tokens`). A layer whose weight cannot be sliced,
    or whose forward another node has replaced, computes all outputs, once for all parts.
    """
    weights = [_sliced_weight(layer, inputs, rows) for rows in parts]
    if any(weight is None for weight in weights):
        outputs = layer(inputs)
        return tuple(outputs[..., rows].contiguous() for rows in parts)
    return tuple(_product(layer, inputs, weight, rows) for weight, rows in zip(weights, parts, strict=True))


def _product(layer: Any, inputs: Tensor, weight: Any, rows: slice) -> Tensor:
    if type(layer) in _BARE:  # torch.compile sees no change of the layer
        return F.linear(inputs, weight, None if layer.bias is None else layer.bias[rows])
    parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    if (bias := layer._parameters.get("bias")) is not None:
        parameters["bias"] = nn.Parameter(bias[rows], requires_grad=False)
    with replaced(layer._parameters, parameters):
        return layer(inputs)


def has_sliceable_format(layer: Any) -> bool:
    """Whether the format in which a layer's weight is stored allows it to compute some outputs alone."""
    quant_format = getattr(layer, "quant_format", None)
    return quant_format is None or quant_format in _SLICEABLE_FORMATS


def _sliced_weight(layer: Any, inputs: Tensor, rows: slice) -> Tensor | None:
    """Some rows of the weight; None where the layer's forward may need all of them."""
    weight = layer._parameters.get("weight")
    if weight is None or weight.device != inputs.device or has_functions(layer) or not is_own_method(layer):
        return None
    if isinstance(weight, QuantizedTensor):
        return _sliced_quantised(weight, rows, _SLICEABLE_FORMATS.get(layer.quant_format))
    # A weight of another precision may have scales beside it that only its layer knows of.
    return weight[rows] if type(weight) is nn.Parameter and weight.dtype == inputs.dtype else None


def _sliced_quantised(weight: Any, rows: slice, multiple: int | None) -> Tensor | None:
    params = weight._params
    if multiple is None or rows.start % multiple or rows.stop % multiple or getattr(params, "transposed", False):
        return None
    scales = {name: getattr(params, name) for name in params._tensor_fields()}
    sliced = {name: it if it.numel() == 1 else it[rows] for name, it in scales.items()}
    shape = (rows.stop - rows.start, *weight.shape[1:])
    return QuantizedTensor(weight._qdata[rows], weight._layout_cls, replace(params, **sliced, orig_shape=shape))
