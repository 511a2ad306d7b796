"""Memory that a device's kernels take for what the meta device does in another way, or within one operation.

A trace on the meta device sees the tensors that PyTorch's operations make there. Three kinds differ from what runs:
functions that the meta device takes apart although the device has one kernel for them, operations of comfy_kitchen that
run as several of PyTorch's where their kernel is off, and kernels with a workspace of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import comfy.quant_ops
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode

from ...i2v_core.memory.meter import StorageMeter
from .attention_memory import sdpa

_KITCHEN = "comfy_kitchen"
_FUNCTION_NAMES = {"quantize_fp8": "quantize_per_tensor_fp8", "dequantize_fp8": "dequantize_per_tensor_fp8"}
"""comfy_kitchen's functions whose operation has another name."""

Operation = Callable[..., Any]


def _convolution_bytes(result: Tensor, input: Tensor, weight: Tensor, *_: Any) -> int:
    """cuDNN's conversions of layout: input, weight and result once more. The most that was seen (InvokeAI 9305)."""
    return input.nbytes + weight.nbytes + result.nbytes


def _int8_linear_bytes(result: Tensor, input: Tensor, *_: Any) -> int:
    """comfy_kitchen 0.2.26: the input in 8 bits, and sums in 32 bits where its own matrix product is not used."""
    return input.numel() + 4 * result.numel()


_WORKSPACES: dict[str, Callable[..., int]] = {
    "aten.convolution.default": _convolution_bytes,
    f"{_KITCHEN}.int8_linear.default": _int8_linear_bytes,
}
"""Bytes that a kernel on a CUDA device takes beside its result, by operation."""


@contextmanager
def kernels_traced(device: torch.device) -> Generator[StorageMeter]:
    """Counts, on the meta device, the memory that operations within the context would take on `device`."""
    with _Functions(device), kernel_meter(device) as meter:
        yield meter


def kernel_meter(device: torch.device, device_type: str | None = None) -> StorageMeter:
    """A meter that also counts what operations allocate within themselves on `device`, where they run or would run.

    Args:
        device_type: of the tensors to count; None counts all.
    """

    def run(operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if _reads_a_fraction(operation, args):
            return 0.0
        parts = _of_quantised(operation, args, kwargs) or _of_kitchen(operation, args, kwargs, device)
        if parts is not None:
            with meter:
                return parts()
        result = operation(*args, **kwargs)
        workspace = _WORKSPACES.get(str(operation)) if device.type == "cuda" else None
        if workspace is not None:
            beside_bytes = result.nbytes + workspace(result, *args, **kwargs)
            with meter:  # the result itself is counted after this
                torch.empty(beside_bytes, dtype=torch.uint8, device=result.device)
        return result

    meter = StorageMeter(device_type=device_type, run=run)
    return meter


def _reads_a_fraction(operation: Operation, args: tuple[Any, ...]) -> bool:
    """Whether an operation reads a fraction back that has no value on the meta device.

    Reading a truth value or a whole number still fails, since those may decide shapes.
    """
    return operation is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].is_floating_point()


class _Functions(TorchFunctionMode):
    """Has functions allocate on the meta device what the one kernel does that `device` has for them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._kernels: dict[Operation, Operation] = {
            F.scaled_dot_product_attention: lambda *args, **kwargs: sdpa(device, *args, **kwargs)
        }
        if _has_fused_rms_norm(device):
            self._kernels |= dict.fromkeys((F.rms_norm, torch.rms_norm), _rms_norm)

    def __torch_function__(
        self, func: Operation, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self._kernels.get(func, func)(*args, **(kwargs or {}))


def _has_fused_rms_norm(device: torch.device) -> bool:
    """Whether this PyTorch has the kernel, as from 2.9 on for CUDA and ROCm."""
    name = "aten::_fused_rms_norm"
    return (
        device.type == "cuda"
        and hasattr(torch.ops.aten, "_fused_rms_norm")
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    )


def _rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: Any = None) -> Tensor:
    """`aten/src/ATen/native/cuda/layer_norm_kernel.cu` (2.11): the result, and a number a row for the backward pass."""
    if weight is not None and weight.dtype != input.dtype:
        return F.rms_norm(input, normalized_shape, weight, eps)  # mixed precisions have no kernel
    contiguous = input.contiguous()
    rows = contiguous.numel() // math.prod(normalized_shape)
    scale = contiguous.new_empty(rows, dtype=torch.float32)
    result = torch.empty_like(contiguous)
    del scale
    return result


def _of_quantised(operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
    """An operation on quantised weights as those on what they wrap, which the meter would not see otherwise."""
    for value in args:
        if isinstance(value, comfy.quant_ops.QuantizedTensor):
            return lambda: type(value).__torch_dispatch__(operation, (), args, kwargs)
    return None


def _of_kitchen(
    operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device
) -> Callable[[], Any] | None:
    """An operation of comfy_kitchen as several of PyTorch's, where it runs so."""
    if getattr(operation, "namespace", None) != _KITCHEN:
        return None
    name: str = operation._opname  # pyright: ignore[reportFunctionMemberAccess]
    # In place they make the same temporaries, after a test for overlaps that meta tensors do not pass.
    found = OPDEFS.get(f"{_KITCHEN}::{name.removesuffix('_')}")
    if found is None:
        return None
    by_name = dict(zip((it.name for it in operation._schema.arguments), args, strict=False)) | dict(kwargs)  # pyright: ignore[reportFunctionMemberAccess]
    if device.type == "cuda" and _runs_as_kernel(_FUNCTION_NAMES.get(name, name), by_name):
        return None

    def run() -> Any:
        result = found._init_fn(**by_name)
        return None if name.endswith("_") else result

    return run


def _runs_as_kernel(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether comfy_kitchen has a kernel that takes these arguments, by its own rules, on this machine's device."""
    try:
        from comfy_kitchen.constraints import validate_function_call
    except ImportError:  # a version without such rules: take it for the way that needs more
        return False
    registry = comfy.quant_ops.ck.registry
    for backend in ("cuda", "hip", "triton"):
        if not registry.is_available(backend) or name not in registry.list_backends()[backend]["capabilities"]:
            continue
        rules = registry.get_constraints(backend, name)
        anywhere = None if rules is None else replace(rules, default_devices=frozenset({"*"}))
        if anywhere is None or validate_function_call(anywhere, arguments, registry._compute_capability).success:
            return True
    return False
