"""A double of ComfyUI-GGUF: operations whose weights stay packed and are dequantised whenever a layer runs.

It has the names by which that node pack's layers are known, and their order of work: dequantise, add the LoRA that was
left on the tensor, cast. The numbers come from the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.lora  # pyright: ignore[reportMissingImports]
import comfy.model_patcher  # pyright: ignore[reportMissingImports]
import comfy.ops  # pyright: ignore[reportMissingImports]
import gguf
import torch
from torch import nn


class PackedTensor(torch.Tensor):
    """Bytes of blocks that present themselves in the shape of the numbers in them."""

    packing: Any
    logical_shape: torch.Size
    patches: list[tuple[Any, str]]

    @staticmethod
    def of(tensor: torch.Tensor, packing: Any) -> PackedTensor:
        rows = torch.from_numpy(gguf.quants.quantize(tensor.float().numpy(), packing))
        return PackedTensor._wrapped(rows, packing, tensor.shape, [])

    @staticmethod
    def _wrapped(rows: torch.Tensor, packing: Any, shape: torch.Size, patches: list[Any]) -> PackedTensor:
        made = rows.as_subclass(PackedTensor)
        made.packing, made.logical_shape, made.patches = packing, shape, list(patches)
        return made

    @property
    def shape(self) -> torch.Size:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self, "logical_shape", None) or self.size()

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = super().to(*args, **kwargs)
        return self._wrapped(made, getattr(self, "packing", None), self.shape, getattr(self, "patches", []))

    def clone(self, *_args: Any, **_kwargs: Any) -> PackedTensor:
        return self

    def detach(self) -> PackedTensor:
        return self


def is_packed(tensor: Any) -> bool:
    return getattr(tensor, "packing", None) is not None


class _PackedLayer(nn.Module):
    comfy_cast_weights = True
    weight: Any
    bias: Any

    def is_ggml_quantized(self) -> bool:
        return is_packed(self.weight) or is_packed(self.bias)

    def cast_bias_weight(
        self, input: Any = None, dtype: Any = None, device: Any = None, bias_dtype: Any = None
    ) -> tuple[Any, Any]:
        dtype = dtype or input.dtype
        device = device or input.device
        bias = None if self.bias is None else restored(self.bias.to(device), dtype).to(bias_dtype or dtype)
        return restored(self.weight.to(device), dtype), bias

    def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
        if not self.is_ggml_quantized():
            return super().forward_comfy_cast_weights(input)  # pyright: ignore[reportAttributeAccessIssue]
        weight, bias = self.cast_bias_weight(input)
        return nn.functional.linear(input, weight, bias)


def restored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of a packed tensor, with its LoRA."""
    if not isinstance(tensor, PackedTensor) or not is_packed(tensor):
        return tensor.to(dtype).as_subclass(torch.Tensor)
    numbers = gguf.quants.dequantize(tensor.as_subclass(torch.Tensor).numpy(), tensor.packing)
    made = torch.from_numpy(numbers).reshape(tensor.shape).to(dtype)
    for patches, key in tensor.patches:
        made = comfy.lora.calculate_weight(patches, made, key)
    return made


class PackedOps(comfy.ops.manual_cast):
    class Linear(_PackedLayer, comfy.ops.manual_cast.Linear):
        def __init__(
            self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
        ):
            nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight, self.bias = None, None

        def _load_from_state_dict(
            self, state_dict: Mapping[str, torch.Tensor], prefix: str, *_args: Any, **_kwargs: Any
        ) -> None:
            self.weight = nn.Parameter(state_dict[prefix + "weight"], requires_grad=False)
            self.bias = nn.Parameter(state_dict[prefix + "bias"], requires_grad=False)


class PackedModelPatcher(comfy.model_patcher.ModelPatcher):
    """Leaves the LoRA of packed weights on their tensors."""

    def patch_weight_to_device(
        self, key: str, device_to: Any = None, inplace_update: bool = False, **kwargs: Any
    ) -> Any:
        weight = comfy.utils.get_attr(self.model, key)  # pyright: ignore[reportAttributeAccessIssue]
        if not is_packed(weight):
            return super().patch_weight_to_device(key, device_to, inplace_update, **kwargs)
        if key in self.patches:
            weight.patches = [(self.patches[key], key)]
        return None

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        for parameter in self.model.parameters() if unpatch_weights else ():
            if is_packed(parameter):
                parameter.patches = []
        return super().unpatch_model(device_to, unpatch_weights)

    def load(self, *args: Any, force_patch_weights: bool = False, **kwargs: Any) -> Any:
        return super().load(*args, force_patch_weights=True, **kwargs)
