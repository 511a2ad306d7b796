"""A model's shape: the same classes on the meta device, two blocks deep, without weights."""

from __future__ import annotations

from collections.abc import Collection

import comfy.ops
import comfy.quant_ops
import torch
from torch import Tensor, nn

from .quantised_layers import is_packed

_BLOCKS = 2


def on_meta(model: nn.Module, block_lists: tuple[str, ...], patched: Collection[str] = ()) -> nn.Module:
    """A copy of the model with two blocks of each list, whose weights have a shape and a format and nothing else.

    Args:
        block_lists: paths of the lists of equal blocks.
        patched: names of weights that patches change at each use, as LoRA those that do not stay on the device.
    """
    shortened = {id(model.get_submodule(path)) for path in block_lists}
    return _copied(model, "", shortened, patched, {})


def _copied(
    module: nn.Module, path: str, shortened: set[int], patched: Collection[str], memo: dict[int, nn.Module]
) -> nn.Module:
    """The module with its own dictionaries; what is neither a tensor nor a module is shared with the original."""
    module = module._modules.get("_orig_mod") or module  # of torch.compile
    if id(module) in memo:
        return memo[id(module)]
    packed = is_packed(module)
    twin: nn.Module = object.__new__(_casting_class(module) if packed else type(module))
    memo[id(module)] = twin
    twin.__dict__.update(module.__dict__)
    children = list(module._modules.items())
    if id(module) in shortened:
        children = children[:_BLOCKS]
    twin.__dict__["_modules"] = {
        name: None if child is None else _copied(child, f"{path}{name}.", shortened, patched, memo)
        for name, child in children
    }
    twin.__dict__["_parameters"] = {
        name: None if it is None else _parameter(it, packed=packed and name == "weight")
        for name, it in module._parameters.items()
    }
    twin.__dict__["_buffers"] = {
        name: None if it is None else torch.empty(it.shape, dtype=it.dtype, device="meta")
        for name, it in module._buffers.items()
    }
    for name in [
        name for name in twin.__dict__ if name in ("_v", "_prefetch") or callable(getattr(type(twin), name, None))
    ]:
        del twin.__dict__[name]  # another model's loading, and methods that are replaced in the instance
    if isinstance(twin, comfy.ops.CastWeightBiasOp):
        functions = [_dequantised] if packed else []
        functions += [_with_lora] if f"{path}weight" in patched else []
        twin.__dict__.update(weight_function=functions, bias_function=[])
    return twin


def _parameter(tensor: Tensor, *, packed: bool) -> nn.Parameter:
    """A parameter of the same shape and format; one that is packed has numbers of 8 bits."""
    if packed:
        described = torch.empty(tuple(tensor.shape), dtype=torch.float8_e4m3fn, device="meta")
    elif isinstance(tensor, comfy.quant_ops.QuantizedTensor):
        described = tensor.detach().to("meta")
    else:
        described = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(described, requires_grad=False)


def _casting_class(module: nn.Module) -> type[nn.Module]:
    """Core's layer class that casts its weights, for a layer of another node's operations."""
    return getattr(comfy.ops.manual_cast, type(module).__name__)


def _dequantised(weight: Tensor) -> Tensor:
    """Allocates as ComfyUI-GGUF's K-quants do (`dequant.py`, 2026): integers, and their products with the scales."""
    parts = [torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)]
    del parts
    return weight


def _with_lora(weight: Tensor) -> Tensor:
    """Allocates as core's `calculate_weight` does: the product of a LoRA's matrices, and that times its strength."""
    parts = [torch.empty_like(weight), torch.empty_like(weight)]
    del parts
    return weight
