"""Weights that lie in memory as a file holds them: quantised, and restored around each layer call.

A linear layer that has `lies_as` has a weight of rows of bytes (uint8), in one of two kinds of format: GGUF's blocks of
numbers that share a scale (llama.cpp's `ggml-quants`; restored by diffusers' own functions, so with its result), and
fp8 with one scale for the whole weight. A few rows at a time, so that little lies beside the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInputError, MissingPackageError
from ..memory.meter import StorageMeter

FP8_FORMATS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""By the names that safetensors has for them."""

_PIECE_NUMBERS = 2**21


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """How the weight of a layer lies: (rows, columns) numbers in `format`, times `scale`."""

    format: str
    rows: int
    columns: int
    scale: float = 1.0

    @property
    def row_bytes(self) -> int:
        numbers, size_bytes = block_of(self.format)
        return self.columns // numbers * size_bytes

    @property
    def stored_bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def dequantizing_bytes(self) -> int:
        """What restoring takes at most, beside the bytes and the result."""
        return 0 if self.format in FP8_FORMATS else _piece_bytes(self.format, self._piece_rows, self.columns)

    def dequantized(self, lying: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers (rows, columns) of `lying` (rows, row_bytes), on its device."""
        whole = torch.empty(self.rows, self.columns, device=lying.device, dtype=dtype)
        if self.format in FP8_FORMATS:
            whole.copy_(lying.view(FP8_FORMATS[self.format]))
            return whole if self.scale == 1 else whole.mul_(self.scale)
        for start in range(0, self.rows, self._piece_rows):
            piece = slice(start, start + self._piece_rows)
            whole[piece] = _dequantized(self.format, lying[piece], self.columns)
        return whole

    @property
    def _piece_rows(self) -> int:
        return min(self.rows, max(1, _PIECE_NUMBERS // self.columns))


def set_storage_format(layer: nn.Linear, form: Quantized) -> None:
    """Say how the weight of a layer lies, or will lie once it is loaded."""
    layer.lies_as = form  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def quantized_weights(module: nn.Module) -> dict[Tensor, Quantized]:
    """The module's weights that lie quantised."""
    parts: list[Any] = list(module.modules())
    return {part.weight: part.lies_as for part in parts if "lies_as" in vars(part)}


def stored_bytes(module: nn.Module) -> Callable[[Tensor], int]:
    """The bytes of each parameter and buffer of the module as it lies, whether or not it has been loaded."""
    quantized = quantized_weights(module)
    return lambda tensor: quantized[tensor].stored_bytes if tensor in quantized else tensor.nbytes


def block_of(format_name: str) -> tuple[int, int]:
    """Numbers and bytes of a block.

    Raises:
        BadInputError: there is no such format.
        MissingPackageError: it is one of GGUF's, which need the package gguf.
    """
    if format_name in FP8_FORMATS:
        return 1, 1
    utils = gguf_formats()
    sizes = {kind.name: utils.GGML_QUANT_SIZES[kind] for kind in utils.dequantize_functions}
    if format_name not in sizes:
        names = ", ".join((*FP8_FORMATS, *sorted(sizes)))
        raise BadInputError(f"'{format_name}' is no format of weights", f"choose one of {names}")
    numbers, size_bytes = sizes[format_name]
    return int(numbers), int(size_bytes)


def gguf_formats() -> Any:
    """diffusers' module of GGUF formats. Raises `MissingPackageError` without the package gguf, which it needs."""
    try:
        import diffusers.quantizers.gguf.utils as formats
    except ImportError as error:
        raise MissingPackageError(
            f"GGUF files need the package gguf, which cannot be imported ({error})",
            "install it with `python -m pip install gguf`, or choose a safetensors file",
        ) from error
    return formats


def _dequantized(format_name: str, lying: Tensor, columns: int) -> Tensor:
    """The numbers (n, columns) of some rows of bytes (n, row_bytes)."""
    utils = gguf_formats()
    kind = next(kind for kind in utils.dequantize_functions if kind.name == format_name)
    numbers, size_bytes = utils.GGML_QUANT_SIZES[kind]
    return utils.dequantize_functions[kind](lying.reshape(-1, size_bytes), numbers, size_bytes).view(-1, columns)


@lru_cache(maxsize=256)
def _piece_bytes(format_name: str, rows: int, columns: int) -> int:
    """Traced without numbers, as all predictions are."""
    row_bytes = Quantized(format=format_name, rows=rows, columns=columns).row_bytes
    lying = torch.empty(rows, row_bytes, dtype=torch.uint8, device="meta")
    with StorageMeter(device_type="meta") as meter:
        _dequantized(format_name, lying, columns)
    return meter.peak_bytes
