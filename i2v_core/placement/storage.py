"""Weights stored in 8 bits, which are dequantised to the compute precision around each layer call.

They take half the memory of 16-bit weights, or a quarter of fp32's; the result is close to the exact one, not equal.
diffusers' layerwise casting is not used, since its hooks on every leaf would cast again for each chunk of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import MissingPackageError
from ..memory.meter import host_memory
from ..units import MIB
from .layer_calls import LayerCall, LayerRunner
from .precision import compute_dtypes
from .quantized import quantized_weights
from .swap import all_tensors, swapped


class WeightStorage(str, Enum):
    """Format that a denoiser's weights are stored in. The 8-bit formats keep one fp32 scale for each output channel."""

    AS_COMPUTED = "as computed"
    """The compute precision."""

    INT8 = "int8"
    """Symmetric int8, quantised by torchao."""

    FP8 = "fp8"
    """E4M3 (Micikevicius et al., "FP8 Formats for Deep Learning", 2022)."""

    @property
    def available(self) -> bool:
        """Whether the package that the format needs is installed."""
        return self is not WeightStorage.INT8 or find_spec("torchao") is not None


# Takes an fp32 weight; returns its values in 8 bits, and the fp32 scale of each output channel, in any shape.
_Reduce = Callable[[Tensor], tuple[Tensor, Tensor]]

# Weights are quantised in chunks that fit into a processor's cache, which takes a fifth of the time.
_CACHED_BYTES = MIB
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def reducible(module: nn.Module) -> list[Tensor]:
    """Return the weights that may be stored in 8 bits: those of linear and convolution layers, without biases.

    Excluded are layers that diffusers' layerwise casting skips, by its own patterns and the model's, and weights that
    are quantised already.
    """
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    patterns = (*DEFAULT_SKIP_MODULES_PATTERN, *(getattr(module, "_skip_layerwise_casting_patterns", None) or ()))

    def skipped(name: str) -> bool:
        """Whether a pattern matches the layer or a module that contains it."""
        paths = accumulate(name.split("."), "{}.{}".format)
        return any(re.search(pattern, path) for path in paths for pattern in patterns)

    parts = cast("Iterable[tuple[str, Any]]", module.named_modules())
    weights = [part.weight for name, part in parts if isinstance(part, _LAYERS) and not skipped(name)]
    quantized = quantized_weights(module)
    return [weight for weight in weights if weight not in quantized]


class StoredWeights:
    """Converts a module's weights between the format that they are stored in and the one that layers compute in.

    The scales of 8-bit weights stay on `device`, in one tensor. `dtype` is the compute precision.
    """

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype, storage: WeightStorage) -> None:
        self.dtype, self.dtype_of = dtype, compute_dtypes(module, dtype)
        self._quantized = quantized_weights(module)
        self._reduce = _REDUCE.get(storage)
        weights = reducible(module) if self._reduce else []
        ends = list(accumulate(len(weight) for weight in weights))
        scales = torch.empty(ends[-1] if ends else 0, device=device, dtype=torch.float32)
        self._scales = {weight: scales[end - len(weight) : end] for weight, end in zip(weights, ends, strict=True)}

    def reduced(self, tensor: Tensor) -> Tensor | None:
        """Return a tensor of the module in 8 bits, in host memory; None if it is not stored in 8 bits.

        Raises:
            MissingPackageError: the format needs a package that is not installed.
        """
        if self._reduce is None or tensor not in self._scales:
            return None
        with host_memory():
            values, scales = _by_rows(tensor.detach(), self._reduce)
        self._scales[tensor].copy_(scales)
        return values

    def computes_with(self, tensor: Tensor) -> bool:
        """Whether layers compute with a tensor of the module in the format that it is stored in."""
        return tensor not in self._quantized and tensor not in self._scales

    def dequantized(self, tensor: Tensor, stored: Tensor) -> Tensor:
        """Return `stored`, the device's copy of the module's `tensor` as it is stored, in the compute precision."""
        if tensor in self._quantized:
            return self._quantized[tensor].dequantized(stored, self.dtype)
        scale = self._scales.get(tensor)
        return stored if scale is None else stored.to(self.dtype).mul_(scale.view(-1, *[1] * (stored.ndim - 1)))


class _DequantizingRunner(LayerRunner):
    """Dequantises the weights of each layer, which are on the device, around its call."""

    def __init__(self, weights: StoredWeights) -> None:
        self._weights = weights

    def enter(self, call: LayerCall) -> AbstractContextManager[None]:
        tensors = [tensor for module in call.modules for tensor in all_tensors(module)]
        return swapped(tensors, [self._weights.dequantized(tensor, tensor.data) for tensor in tensors])


@contextmanager
def resident(
    module: nn.Module, device: torch.device, dtype: torch.dtype, storage: WeightStorage
) -> Generator[LayerRunner]:
    """Place the module's weights on the device in the format `storage`, within the context.

    Yields the runner that the module's forward must run its layers with. Afterwards the module holds the host's weights
    again, bit for bit.
    """
    weights = StoredWeights(module, device, dtype, storage)

    def on_device(tensor: Tensor) -> Tensor:
        values = weights.reduced(tensor)
        if values is not None:
            return torch.empty_like(values, device=device).copy_(values)
        return tensor.data.to(device=device, dtype=weights.dtype_of(tensor))

    tensors = all_tensors(module)
    with swapped(tensors, [on_device(tensor) for tensor in tensors]):
        yield _DequantizingRunner(weights)


def _by_rows(weight: Tensor, reduce: _Reduce) -> tuple[Tensor, Tensor]:
    """Quantise a weight a few output channels at a time; returns its values, and its scales (channels)."""
    count = max(1, _CACHED_BYTES // (weight[0].numel() * torch.float32.itemsize))
    reduced = [reduce(weight[start : start + count].float()) for start in range(0, len(weight), count)]
    return torch.cat([values for values, _ in reduced]), torch.cat([scales.flatten() for _, scales in reduced])


def _fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    largest = torch.finfo(torch.float8_e4m3fn).max
    # The minimum keeps a channel of zeros from being divided by zero.
    scale = (_channel_peaks(weight) / largest).clamp_min_(torch.finfo(torch.float32).tiny)
    return (weight / scale).clamp_(-largest, largest).to(torch.float8_e4m3fn), scale


def _channel_peaks(weight: Tensor) -> Tensor:
    return weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    try:
        import torchao.quantization as untyped  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise MissingPackageError(
            f"weights in int8 need torchao, which cannot be imported ({error})",
            "install it with `python -m pip install torchao`, or turn allow_approximate off in VRAM Budget",
        ) from error
    torchao: Any = untyped
    block, limits = (1, *weight.shape[1:]), {"quant_min": -127, "quant_max": 127}
    symmetric = torchao.MappingType.SYMMETRIC
    scale, zero_point = torchao.choose_qparams_affine(weight, symmetric, block, torch.int8, **limits)
    values = torchao.quantize_affine(weight, block, scale, zero_point, torch.int8, **limits)
    return values, scale


_REDUCE: dict[WeightStorage, _Reduce] = {WeightStorage.INT8: _int8, WeightStorage.FP8: _fp8}
