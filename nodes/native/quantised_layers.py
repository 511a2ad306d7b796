"""Products of linear layers whose weight is stored in a quantised format, as core makes them.

As stored: core quantises the layer's input too, and multiplies the two. Dequantised: where the card has no such
product, or a LoRA is added while the layer runs, core restores the weight first. The conditions are those of
`comfy.ops.mixed_precision_ops` and `comfy.ops.fp8_ops`.
"""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

_SCALED_BY_ROW = ("float8_e4m3fn", "float8_e5m2", "mxfp8", "int8_tensorwise", "convrot_w4a4")
"""Formats in which a row of the input has its own scale, or one that does not depend on the input (fp8: the file's, or
1). A format that is not named here may take its scale from all rows, as NVFP4 does without one in the file."""
_RESTORED_LAYOUTS = (
    "TensorCoreFP8Layout",
    "TensorCoreFP8E4M3Layout",
    "TensorCoreFP8E5M2Layout",
    "TensorCoreNVFP4Layout",
    "TensorCoreMXFP8Layout",
    "GGMLLayout",
)
"""Layouts whose product with an input that is not quantised is that of the dequantised weight; int8 has another."""


def is_packed(layer: Any) -> bool:
    """Whether a layer's weight is in a format of ComfyUI-GGUF's, which core does not see, whatever dtype it names."""
    return hasattr(layer, "is_ggml_quantized") and bool(layer.is_ggml_quantized())


def is_mixed_precision(layer: Any) -> bool:
    """Whether a layer is one of core's that may hold a quantised weight, and casts it whenever it runs."""
    return hasattr(layer, "_full_precision_mm")


def has_functions(layer: Any) -> bool:
    """Whether core adds something to the layer's weights whenever it runs, such as a LoRA to weights in host memory."""
    return bool(getattr(layer, "weight_function", None) or getattr(layer, "bias_function", None))


def multiplied_as_stored(layer: Any) -> bool:
    """Whether core multiplies the layer's weight in the format in which it is stored."""
    if has_functions(layer):
        return False
    if isinstance(layer, comfy.ops.fp8_ops.Linear):
        return layer.weight.dtype == torch.float8_e4m3fn
    return (
        getattr(layer, "layout_type", None) is not None
        and not layer._full_precision_mm
        and not getattr(layer, "comfy_force_cast_weights", False)
    )


def quantises_input(layer: Any) -> bool:
    """Whether core quantises the input before it brings in the weight of a layer that is multiplied as stored."""
    quant_format = getattr(layer, "quant_format", None)
    return quant_format is not None and bool(QUANT_ALGOS[quant_format].get("quantize_input", True))


def scales_whole_input(layer: Any) -> bool:
    """Whether the layer's input is quantised by a scale of all its rows, so that chunks would give another result."""
    return (
        getattr(layer, "quant_format", None) is not None
        and multiplied_as_stored(layer)
        and layer.quant_format not in _SCALED_BY_ROW
        and getattr(layer, "input_scale", None) is None
    )


def is_restored(weight: Any) -> bool:
    """Whether a product with this weight dequantises it first, each time."""
    return isinstance(weight, QuantizedTensor) and weight._layout_cls in _RESTORED_LAYOUTS
