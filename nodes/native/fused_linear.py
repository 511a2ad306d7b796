"""Some outputs of a linear layer that makes several tensors at once, such as query, key and value."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .model import is_own_method
from .quantised_layers import has_functions


def linear_rows(layer: Any, inputs: Tensor, rows: slice) -> Tensor:
    """Outputs `rows` of `layer(inputs)`, computed without the others where the weight allows it.

    To be called while the layer's weights are held (`calls.CallState.tokens`). A weight that is multiplied in its
    quantised format, a layer that scales its input first, and one whose forward another node has replaced compute all
    outputs.
    """
    weight = layer._parameters.get("weight")
    is_plain = type(weight) is nn.Parameter and weight.dtype == inputs.dtype and is_own_method(layer)
    if not is_plain or has_functions(layer) or getattr(layer, "pre_quant_scale", None) is not None:
        return layer(inputs)[..., rows].contiguous()
    bias = layer._parameters.get("bias")
    return F.linear(inputs, weight[rows], None if bias is None else bias[rows])
