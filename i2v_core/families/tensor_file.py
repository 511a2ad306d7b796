"""What a file of weights holds, from its header: names, shapes and formats, and each tensor when it is asked for."""

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
_AGAIN = "download the file again, whole"
_WEIGHT = ".weight"
_SCALES = (".scale_weight", ".weight_scale")
_OF_COMPUTATION = (".scale_input", ".input_scale", ".pre_quant_scale")
_MARKS = ("scaled_fp8",)
_LAYER_FORMAT = ".comfy_quant"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a file.

    `format` is None for floats, which `read` gives in `shape`. Else that of quantised numbers: `read` gives rows of
    bytes (rows, row_bytes), whose numbers are multiplied with `scale`.
    """

    shape: tuple[int, ...]
    format: str | None
    read: Callable[[], Tensor]
    scale: float = 1.0


def read_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a GGUF or safetensors file by name; none is read yet.

    Raises:
        ModelFolderError: there is no such file, it is damaged, or holds numbers in a format that cannot be used.
        MissingPackageError: it is a GGUF file, and the package that reads those is not installed.
    """
    if not file.is_file():
        raise ModelFolderError(f"there is no file {file}", "choose another in I2V Loader")
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise ModelFolderError(f"{file} is no file of weights that can be read", "use a .gguf or .safetensors file")
    try:
        return reader(file)
    except I2VError:
        raise
    # Of headers cut off or of nonsense the libraries raise whatever their arithmetic meets.
    except Exception as error:
        raise ModelFolderError(f"{file} is damaged ({error!r})", _AGAIN) from error


def _gguf(file: Path) -> dict[str, StoredTensor]:
    formats = gguf_formats()
    from gguf import GGUFReader

    untyped: Any = GGUFReader
    reader = untyped(file)
    return {tensor.name: _of_gguf(file, tensor, _shape_told(reader, tensor.name), formats) for tensor in reader.tensors}


def _shape_told(reader: Any, name: str) -> tuple[int, ...] | None:
    """A shape in the metadata: files for ComfyUI keep there what GGUF has too few dimensions for."""
    field = reader.fields.get(f"comfy.gguf.orig_shape.{name}")
    return None if field is None else tuple(int(field.parts[index][0]) for index in field.data)


def _of_gguf(file: Path, tensor: Any, told: tuple[int, ...] | None, formats: Any) -> StoredTensor:
    kind, shape = tensor.tensor_type.name, tuple(int(side) for side in reversed(tensor.shape))

    def read() -> Tensor:
        return torch.tensor(tensor.data)

    def read_floats() -> Tensor:
        # The reader knows no bfloat16, and gives bytes.
        floats = read().view(torch.bfloat16) if kind == "BF16" else read()
        return floats.view(told or shape)

    if kind in _FLOATS:
        return StoredTensor(shape=told or shape, format=None, read=read_floats)
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
    beside = (*_SCALES, *_OF_COMPUTATION, *_MARKS, _LAYER_FORMAT)
    found = {name: _of_safetensors(file, name, content) for name in names if not name.endswith(beside)}
    return _with_scales(file, found, scales)


def _of_safetensors(file: Path, name: str, content: Any) -> StoredTensor:
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


def _rows(lying: Tensor) -> Tensor:
    return lying.reshape(-1, lying.shape[-1])


def _scaled(name: str) -> str:
    """The weight that a scale is of."""
    return name[: name.rindex(".")] + _WEIGHT


def _scale(file: Path, name: str, content: Any) -> float:
    scale: Tensor = content.get_tensor(name)
    if scale.numel() != 1:
        raise _unreadable(file, name, f"{scale.numel()} scales", "use a file with one scale a weight, or a GGUF file")
    return float(scale)


def _check_layer_format(file: Path, name: str, content: Any) -> None:
    told = json.loads(bytes(content.get_tensor(name).tolist()))
    if not str(told.get("format")).startswith("float8_"):
        raise _unreadable(file, name, str(told.get("format")), "use an fp8 or a GGUF file")


def _with_scales(
    file: Path, tensors: Mapping[str, StoredTensor], scales: Mapping[str, float]
) -> dict[str, StoredTensor]:
    for name, scale in scales.items():
        if scale != 1 and (name not in tensors or tensors[name].format is None):
            raise ModelFolderError(f"{file} has a scale for {name}, which is not there in fp8", _AGAIN)
    return {name: replace(tensor, scale=scales.get(name, 1.0)) for name, tensor in tensors.items()}


def _unreadable(file: Path, name: str, kind: str, remedy: str) -> ModelFolderError:
    return ModelFolderError(f"{file} holds {name} as {kind}, which cannot be used", remedy)


_READERS: dict[str, Callable[[Path], dict[str, StoredTensor]]] = {".gguf": _gguf, ".safetensors": _safetensors}

SUFFIXES = frozenset(_READERS)
"""Of the files that can be read, in small letters."""
