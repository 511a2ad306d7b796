"""Weights that stay in memory in a file's quantised format, and are dequantised around each layer call.

A linear layer with an attribute `storage_format` has a weight of rows of bytes (uint8). There are two kinds of format:
GGUF's blocks of numbers that share a scale (llama.cpp's `ggml-quants`), which diffusers' own functions dequantise, and
fp8 with one scale for the weight. Rows are dequantised a few at a time, so that temporary memory stays small.
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
"""The fp8 dtypes, by safetensors' names for them."""

# Elements that are dequantised at a time: enough to keep a GPU busy, and a few MiB.
_CHUNK_ELEMENTS = 2**21


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """The storage format of a layer's weight: (rows, columns) numbers in `format`, times `scale`."""

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
        """Peak bytes that dequantising takes beside the stored bytes and the result."""
        return 0 if self.format in FP8_FORMATS else _chunk_bytes(self.format, self._chunk_rows, self.columns)

    def dequantized(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the numbers (rows, columns) in `dtype` of `stored` (rows, row_bytes), on the same device."""
        result = torch.empty(self.rows, self.columns, device=stored.device, dtype=dtype)
        if self.format in FP8_FORMATS:
            result.copy_(stored.view(FP8_FORMATS[self.format]))
            return result if self.scale == 1 else result.mul_(self.scale)
        for start in range(0, self.rows, self._chunk_rows):
            piece = slice(start, start + self._chunk_rows)
            result[piece] = _dequantized(self.format, stored[piece], self.columns)
        return result

    @property
    def _chunk_rows(self) -> int:
        return min(self.rows, max(1, _CHUNK_ELEMENTS // self.columns))


def set_storage_format(layer: nn.Linear, form: Quantized) -> None:
    """Mark a layer with the format that its weight is stored in, or will be once it is loaded."""
    layer.storage_format = form  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def quantized_weights(module: nn.Module) -> dict[Tensor, Quantized]:
    """Return the module's quantised weights with their formats."""
    parts: list[Any] = list(module.modules())
    return {part.weight: part.storage_format for part in parts if "storage_format" in vars(part)}


def stored_bytes(module: nn.Module) -> Callable[[Tensor], int]:
    """Return a function that gives the stored bytes of each of the module's tensors, whether loaded or not."""
    quantized = quantized_weights(module)
    return lambda tensor: quantized[tensor].stored_bytes if tensor in quantized else tensor.nbytes


def block_of(format_name: str) -> tuple[int, int]:
    """Return the numbers and the bytes of one block of a format.

    Raises:
        BadInputError: there is no such format.
        MissingPackageError: it is a GGUF format, and the package gguf is missing.
    """
    if format_name in FP8_FORMATS:
        return 1, 1
    utils = gguf_formats()
    sizes = {kind.name: utils.GGML_QUANT_SIZES[kind] for kind in utils.dequantize_functions}
    if format_name not in sizes:
        names = ", ".join((*FP8_FORMATS, *sorted(sizes)))
        raise BadInputError(f"'{format_name}' is not a weight format", f"choose one of {names}")
    numbers, size_bytes = sizes[format_name]
    return int(numbers), int(size_bytes)


def gguf_formats() -> Any:
    """Return diffusers' module of GGUF formats. Raises `MissingPackageError` if the package gguf is missing."""
    try:
        import diffusers.quantizers.gguf.utils as formats
    except ImportError as error:
        raise MissingPackageError(
            f"GGUF files need the package gguf, which cannot be imported ({error})",
            "install it with `python -m pip install gguf`, or choose a safetensors file",
        ) from error
    return formats


def _dequantized(format_name: str, stored: Tensor, columns: int) -> Tensor:
    """Return the numbers (n, columns) of some rows of bytes (n, row_bytes)."""
    utils = gguf_formats()
    kind = next(kind for kind in utils.dequantize_functions if kind.name == format_name)
    numbers, size_bytes = utils.GGML_QUANT_SIZES[kind]
    return utils.dequantize_functions[kind](stored.reshape(-1, size_bytes), numbers, size_bytes).view(-1, columns)


@lru_cache(maxsize=256)
def _chunk_bytes(format_name: str, rows: int, columns: int) -> int:
    """Return the peak bytes of dequantising some rows, traced on meta tensors as all predictions are."""
    row_bytes = Quantized(format=format_name, rows=rows, columns=columns).row_bytes
    stored = torch.empty(rows, row_bytes, dtype=torch.uint8, device="meta")
    with StorageMeter(device_type="meta") as meter:
        _dequantized(format_name, stored, columns)
    return meter.peak_bytes
