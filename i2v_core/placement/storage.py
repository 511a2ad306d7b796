"""Weights that lie in memory in 8 bits, and come to the precision of computation around each layer call.

Half the memory of 16-bit weights, or a quarter of fp32's, for a result that is close to the exact one and not the same.
Hooks on every leaf, as diffusers' layerwise casting has them, would cast again for each chunk of a layer.
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
from .precision import computing_dtypes
from .quantized import quantized_weights
from .swap import all_tensors, swapped


class WeightStorage(str, Enum):
    """How a denoiser's weights lie in memory.

    FP8 is E4M3 (Micikevicius et al., "FP8 Formats for Deep Learning", 2022), INT8 symmetric, made by torchao. Both keep
    one fp32 scale for each output channel, and so take the same memory.
    """

    AS_COMPUTED = "as computed"
    INT8 = "int8"
    FP8 = "fp8"

    @property
    def available(self) -> bool:
        """Whether what it needs is installed."""
        return self is not WeightStorage.INT8 or find_spec("torchao") is not None


# fp32 weight -> its values in 8 bits, and the fp32 scale of each output channel, in any shape.
_Reduce = Callable[[Tensor], tuple[Tensor, Tensor]]

_CACHED_BYTES = MIB
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def reducible(module: nn.Module) -> list[Tensor]:
    """The weights that may lie in 8 bits: those of linear and convolution layers, their biases left out.

    Left alone is what diffusers' layerwise casting leaves alone, by its own patterns and the model's, and what a file
    holds quantised.
    """
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    patterns = (*DEFAULT_SKIP_MODULES_PATTERN, *(getattr(module, "_skip_layerwise_casting_patterns", None) or ()))

    def skipped(name: str) -> bool:
        """Whether a pattern meets the layer or anything that it is part of."""
        paths = accumulate(name.split("."), "{}.{}".format)
        return any(re.search(pattern, path) for path in paths for pattern in patterns)

    parts = cast("Iterable[tuple[str, Any]]", module.named_modules())
    weights = [part.weight for name, part in parts if isinstance(part, _LAYERS) and not skipped(name)]
    quantized = quantized_weights(module)
    return [weight for weight in weights if weight not in quantized]


class StoredWeights:
    """What lies in memory of a module's weights, and how it becomes what layers compute with.

    The scales of what lies in 8 bits stay on `device`, in one piece. `dtype` is the precision of computation.
    """

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype, storage: WeightStorage) -> None:
        self.dtype, self.dtype_of = dtype, computing_dtypes(module, dtype)
        self._quantized = quantized_weights(module)
        self._reduce = _REDUCE.get(storage)
        weights = reducible(module) if self._reduce else []
        ends = list(accumulate(len(weight) for weight in weights))
        scales = torch.empty(ends[-1] if ends else 0, device=device, dtype=torch.float32)
        self._scales = {weight: scales[end - len(weight) : end] for weight, end in zip(weights, ends, strict=True)}

    def reduced(self, tensor: Tensor) -> Tensor | None:
        """A tensor of the module in 8 bits, in host memory; None if it lies in the precision of computation.

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
        """Whether layers compute with what a tensor of the module lies as."""
        return tensor not in self._quantized and tensor not in self._scales

    def dequantized(self, tensor: Tensor, lying: Tensor) -> Tensor:
        """The precision of computation of `lying`, which is on the device what `tensor` of the module lies as."""
        if tensor in self._quantized:
            return self._quantized[tensor].dequantized(lying, self.dtype)
        scale = self._scales.get(tensor)
        return lying if scale is None else lying.to(self.dtype).mul_(scale.view(-1, *[1] * (lying.ndim - 1)))


class _DequantizingRunner(LayerRunner):
    """Restores the weights of each layer, which lie on the device, around its call."""

    def __init__(self, weights: StoredWeights) -> None:
        self._weights = weights

    def enter(self, call: LayerCall) -> AbstractContextManager[None]:
        tensors = [tensor for module in call.modules for tensor in all_tensors(module)]
        return swapped(tensors, [self._weights.dequantized(tensor, tensor.data) for tensor in tensors])


@contextmanager
def resident(
    module: nn.Module, device: torch.device, dtype: torch.dtype, storage: WeightStorage
) -> Generator[LayerRunner]:
    """The module's weights on the device, lying as `storage` says, for a forward that runs through the given runner.

    Afterwards the module holds the host's weights again, bit for bit.
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
    """The values and the scales (channels) of a weight, made a few output channels at a time: what fits into a
    processor's cache takes a fifth of the time.
    """
    count = max(1, _CACHED_BYTES // (weight[0].numel() * torch.float32.itemsize))
    reduced = [reduce(weight[start : start + count].float()) for start in range(0, len(weight), count)]
    return torch.cat([values for values, _ in reduced]), torch.cat([scales.flatten() for _, scales in reduced])


def _fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    largest = torch.finfo(torch.float8_e4m3fn).max
    # The least scale keeps a channel of zeros from dividing by zero.
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
