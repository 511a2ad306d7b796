"""Reading a file of weights: names, shapes and formats from its header, and each tensor on request."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import I2VError, ModelFolderError
from ..placement.quantized import FP8_FORMATS, gguf_formats

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_DOWNLOAD_AGAIN = "download the file again, whole"
_WEIGHT = ".weight"
_SCALES = (".scale_weight", ".weight_scale")
_COMPUTE_SCALES = (".scale_input", ".input_scale", ".pre_quant_scale")
_MARKS = ("scaled_fp8",)
_LAYER_FORMAT = ".comfy_quant"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a file, which is read on request."""

    shape: tuple[int, ...]

    format: str | None
    """The quantised format; None for floats."""

    read: Callable[[], Tensor]
    """Returns floats in `shape`, or rows of bytes (rows, row_bytes) of quantised numbers."""

    scale: float = 1.0
    """Factor of the quantised numbers."""


def read_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a GGUF or safetensors file by name, without reading their values.

    Raises:
        ModelFolderError: there is no such file, it is damaged, or has a format that cannot be used.
        MissingPackageError: it is a GGUF file, and the package gguf is not installed.
    """
    if not file.is_file():
        raise ModelFolderError(f"there is no file {file}", "choose another in I2V Loader")
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise ModelFolderError(f"{file} is not a weights file that can be read", "use a .gguf or .safetensors file")
    try:
        return reader(file)
    except I2VError:
        raise
    # For truncated or nonsensical headers the libraries raise errors of all kinds.
    except Exception as error:
        raise ModelFolderError(f"{file} is damaged ({error!r})", _DOWNLOAD_AGAIN) from error


def _gguf(file: Path) -> dict[str, StoredTensor]:
    formats = gguf_formats()
    from gguf import GGUFReader

    untyped: Any = GGUFReader
    reader = untyped(file)
    return {
        tensor.name: _gguf_tensor(file, tensor, _recorded_shape(reader, tensor.name), formats)
        for tensor in reader.tensors
    }


def _recorded_shape(reader: Any, name: str) -> tuple[int, ...] | None:
    """Return a shape from the metadata, where files for ComfyUI record shapes of more dimensions than GGUF allows."""
    field = reader.fields.get(f"comfy.gguf.orig_shape.{name}")
    return None if field is None else tuple(int(field.parts[index][0]) for index in field.data)


def _gguf_tensor(file: Path, tensor: Any, recorded: tuple[int, ...] | None, formats: Any) -> StoredTensor:
    kind, shape = tensor.tensor_type.name, tuple(int(side) for side in reversed(tensor.shape))

    def read() -> Tensor:
        return torch.tensor(tensor.data)

    def read_floats() -> Tensor:
        # The reader does not support bfloat16, and returns bytes.
        floats = read().view(torch.bfloat16) if kind == "BF16" else read()
        return floats.view(recorded or shape)

    if kind in _FLOATS:
        return StoredTensor(shape=recorded or shape, format=None, read=read_floats)
    if tensor.tensor_type not in formats.dequantize_functions:
        known = ", ".join(sorted(it.name for it in formats.dequantize_functions))
        raise _unreadable(file, tensor.name, kind, f"use a file in one of {known}")
    return StoredTensor(shape=shape, format=kind, read=lambda: _rows(read()))


def _safetensors(file: Path) -> dict[str, StoredTensor]:
    untyped: Any = safe_open
    content = untyped(file, framework="pt")
    names: list[str] = list(content.keys())
    scales = {_scaled(name): _scale(file, name, content) for name in names if name.endswith(_SCALES)}
    for name in names:
        if name.endswith(_LAYER_FORMAT):
            _check_layer_format(file, name, content)
    ignored = (*_SCALES, *_COMPUTE_SCALES, *_MARKS, _LAYER_FORMAT)
    found = {name: _safetensors_tensor(file, name, content) for name in names if not name.endswith(ignored)}
    return _with_scales(file, found, scales)


def _safetensors_tensor(file: Path, name: str, content: Any) -> StoredTensor:
    header = content.get_slice(name)
    kind, shape = str(header.get_dtype()), tuple(int(side) for side in header.get_shape())

    def read() -> Tensor:
        return content.get_tensor(name)

    if kind in _FLOATS:
        return StoredTensor(shape=shape, format=None, read=read)
    if kind not in FP8_FORMATS:
        known = ", ".join((*sorted(_FLOATS), *FP8_FORMATS))
        raise _unreadable(file, name, kind, f"use a file in one of {known}, or a GGUF file")
    return StoredTensor(shape=shape, format=kind, read=lambda: _rows(read().view(torch.uint8)))


def _rows(stored: Tensor) -> Tensor:
    return stored.reshape(-1, stored.shape[-1])


def _scaled(name: str) -> str:
    """Return the name of the weight that a scale belongs to."""
    return name[: name.rindex(".")] + _WEIGHT


def _scale(file: Path, name: str, content: Any) -> float:
    scale: Tensor = content.get_tensor(name)
    if scale.numel() != 1:
        raise _unreadable(file, name, f"{scale.numel()} scales", "use a file with one scale a weight, or a GGUF file")
    return float(scale)


def _check_layer_format(file: Path, name: str, content: Any) -> None:
    recorded = json.loads(bytes(content.get_tensor(name).tolist()))
    if not str(recorded.get("format")).startswith("float8_"):
        raise _unreadable(file, name, str(recorded.get("format")), "use an fp8 or a GGUF file")


def _with_scales(
    file: Path, tensors: Mapping[str, StoredTensor], scales: Mapping[str, float]
) -> dict[str, StoredTensor]:
    for name, scale in scales.items():
        if scale != 1 and (name not in tensors or tensors[name].format is None):
            raise ModelFolderError(f"{file} has a scale for {name}, which is not there in fp8", _DOWNLOAD_AGAIN)
    return {name: replace(tensor, scale=scales.get(name, 1.0)) for name, tensor in tensors.items()}


def _unreadable(file: Path, name: str, kind: str, remedy: str) -> ModelFolderError:
    return ModelFolderError(f"{file} holds {name} as {kind}, which cannot be used", remedy)


_READERS: dict[str, Callable[[Path], dict[str, StoredTensor]]] = {".gguf": _gguf, ".safetensors": _safetensors}

SUFFIXES = frozenset(_READERS)
"""Suffixes of files that can be read, in lower case."""
