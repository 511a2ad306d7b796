"""Small Wans with weights in core's quantised formats, loaded by core from a file's tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.sd  # pyright: ignore[reportMissingImports]
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor  # pyright: ignore[reportMissingImports]

CONFIG = {"dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 2, "freq_dim": 256}
"""As core detects it in the file: heads are 128 wide."""
GROUP = 64
"""Numbers that the rotated formats take together; core's default does not divide these layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One of core's formats, with what the file says of each layer."""

    name: str
    config: Mapping[str, Any]
    options: Mapping[str, Any]
    """Of core's quantiser."""

    @property
    def exists(self) -> bool:
        return self.name in QUANT_ALGOS


_SCALED = {"scale": "recalculate"}
_ROTATED = {"convrot": True, "convrot_groupsize": GROUP}
FORMATS = {
    "fp8": Format(name="float8_e4m3fn", config={}, options=_SCALED),
    "fp8 e5m2": Format(name="float8_e5m2", config={}, options=_SCALED),
    "nvfp4": Format(name="nvfp4", config={}, options=_SCALED),
    "mxfp8": Format(name="mxfp8", config={}, options={}),
    "int8": Format(name="int8_tensorwise", config={}, options={"per_channel": True}),
    "int8 rotated": Format(name="int8_tensorwise", config=_ROTATED, options={"per_channel": True, **_ROTATED}),
    "int8 in full precision": Format(
        name="int8_tensorwise", config={"full_precision_matrix_mult": True}, options={"per_channel": True}
    ),
    "int4 rotated": Format(
        name="convrot_w4a4", config={"convrot_groupsize": GROUP}, options={"convrot_groupsize": GROUP}
    ),
}


def quantised_file(tensors: Mapping[str, torch.Tensor], chosen: Format) -> dict[str, torch.Tensor]:
    """The tensors of a file whose blocks' linear layers are quantised."""
    layout = QUANT_ALGOS[chosen.name]["comfy_tensor_layout"]
    marker = torch.tensor(list(json.dumps({"format": chosen.name, **chosen.config}).encode()), dtype=torch.uint8)
    file: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not is_block_weight(name, tensor):
            file[name] = tensor.clone()
            continue
        file |= QuantizedTensor.from_float(tensor, layout, **chosen.options).state_dict(name)
        file[name.removesuffix("weight") + "comfy_quant"] = marker
    return file


def is_block_weight(name: str, tensor: torch.Tensor) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2


def loaded(file: Mapping[str, torch.Tensor], **options: Any) -> Any:
    """A patcher as core's loader makes it of a file's tensors."""
    return comfy.sd.load_diffusion_model_state_dict(dict(file), model_options=options)


def multiply_as_stored(patcher: Any, input_scale: float | None = None) -> None:
    """Lets a model's layers run as on a card that multiplies their format."""
    for layer in patcher.model.diffusion_model.modules():
        if getattr(layer, "quant_format", None) is not None:
            layer._full_precision_mm = False
            if input_scale is not None:
                layer.input_scale = torch.nn.Parameter(torch.tensor(input_scale), requires_grad=False)
