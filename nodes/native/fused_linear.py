"""Some outputs of a linear layer that makes several tensors at once, such as query, key and value."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .model import is_own_method


def linear_rows(layer: Any, inputs: Tensor, rows: slice) -> Tensor:
    """Outputs `rows` of `layer(inputs)`; see `linear_parts`."""
    (made,) = linear_parts(layer, inputs, rows)
    return made


def linear_parts(layer: Any, inputs: Tensor, *parts: slice) -> tuple[Tensor, ...]:
    """Some outputs of `layer(inputs)`, a tensor for each of `parts`, without the others where the weight allows it.

    To be called while the layer's weights are held (`calls.CallState.tokens`). A weight that is multiplied in its
    quantised format, and a layer whose forward another node has replaced, compute all outputs, once.
    """
    if not _is_sliceable(layer, inputs):
        outputs = layer(inputs)
        return tuple(outputs[..., rows].contiguous() for rows in parts)
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    return tuple(F.linear(inputs, weight[rows], None if bias is None else bias[rows]) for rows in parts)


def _is_sliceable(layer: Any, inputs: Tensor) -> bool:
    """Whether the layer does nothing but multiply by its weight, as it lies there."""
    weight = layer._parameters.get("weight")
    functions = ("weight_function", "bias_function", "pre_quant_scale")  # the last scales the layer's input
    return (
        type(weight) is nn.Parameter
        and weight.dtype == inputs.dtype
        and is_own_method(layer)
        and not any(_is_set(getattr(layer, name, None)) for name in functions)
    )


def _is_set(value: Any) -> bool:
    return isinstance(value, Tensor) or bool(value)
