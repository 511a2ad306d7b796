"""A Wan transformer from one file, GGUF or safetensors, as people have it for other nodes: weights alone, no config.

The file may name its weights as the published code does, or as diffusers does. What it holds quantised stays so in
memory (`placement/quantized.py`), but for the few that diffusers keeps in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import BadInputError, ModelFolderError
from ...placement.quantized import Quantized, block_of, set_storage_format
from ..tensor_file import SUFFIXES, StoredTensor, read_tensors

TensorsByName = Mapping[str, StoredTensor]
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_OF_DIFFUSERS = "condition_embedder."
_INPUT = "patch_embedding.weight"
# By the names that users have for them: files are named after the size of their mixture too.
_FORMATS = {"FP8": "F8_E4M3"} | {f"Q{bits}_K_{size}": f"Q{bits}_K" for bits in (3, 4, 5) for size in "SML"}
_ANOTHER = "choose the file of the model whose folder is chosen"


def tensors_of(file: Path, config: Mapping[str, Any]) -> TensorsByName:
    """What the file holds for a transformer of this config, by diffusers' names; no weights are read.

    Raises:
        ModelFolderError: the file is damaged, of another model, or in a format that cannot be used.
        MissingPackageError: the package gguf is needed.
    """
    tensors = _named_as_diffusers(file, read_tensors(file))
    _check(file, tensors, _skeleton(config))
    return tensors


def quantized_in(tensors: TensorsByName, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the weights that will lie quantised, by format."""
    layers = _linear_layers(_skeleton(config))
    found: dict[str, list[str]] = {}
    for name, tensor in sorted(tensors.items()):
        if tensor.format is not None and name in layers:
            found.setdefault(tensor.format, []).append(name)
    return found


def stored_as(weights: str, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """As `quantized_in`, for a plan without a model: `weights` names a file, or a format that all blocks lie in, as
    most of a file of 4 to 8 bits does.

    Raises:
        BadInputError: it is no file and no format, or rows of weights do not make whole blocks of it.
        ModelFolderError: the file is damaged, or of another model.
        MissingPackageError: the package gguf is needed.
    """
    if Path(weights).suffix.lower() in SUFFIXES:
        return quantized_in(tensors_of(Path(weights), config), config)
    format_name = _FORMATS.get(weights.upper(), weights.upper())
    layers = {name: it for name, it in _linear_layers(_skeleton(config)).items() if name.startswith("blocks.")}
    numbers, _ = block_of(format_name)
    if any(layer.in_features % numbers for layer in layers.values()):
        raise BadInputError(f"the model's weights make no whole blocks of {format_name}", "choose another format")
    return {format_name: sorted(layers)}


def set_storage_formats(transformer: nn.Module, stored: Mapping[str, list[str]]) -> None:
    """Mark the layers of a transformer without weights with what `quantized_in` says."""
    layers = _linear_layers(transformer)
    for format_name, names in stored.items():
        for name in names:
            layer = layers[name]
            set_storage_format(layer, Quantized(format=format_name, rows=layer.out_features, columns=layer.in_features))


def load(tensors: TensorsByName, config: Mapping[str, Any]) -> nn.Module:
    """The transformer in host RAM, with its weights as the file has them."""
    import accelerate as untyped  # pyright: ignore[reportMissingTypeStubs]

    accelerate: Any = untyped
    with accelerate.init_empty_weights():
        transformer = _class().from_config(config)
    layers = _linear_layers(transformer)
    for name, tensor in tensors.items():
        owner, _, own_name = name.rpartition(".")
        lying = tensor.read()
        form = _form(tensor)
        if form is not None and name in layers:
            set_storage_format(layers[name], form)
        elif form is not None:
            lying = form.dequantized(lying, torch.float32).view(tensor.shape)
        setattr(transformer.get_submodule(owner), own_name, nn.Parameter(lying, requires_grad=False))
    return transformer.eval()


def _form(tensor: StoredTensor) -> Quantized | None:
    if tensor.format is None:
        return None
    rows, columns = prod(tensor.shape[:-1]), tensor.shape[-1]
    return Quantized(format=tensor.format, rows=rows, columns=columns, scale=tensor.scale)


def _class() -> Any:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    return WanTransformer3DModel


def _skeleton(config: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return _class().from_config(config)


def _linear_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    """Layers whose weights may lie quantised, by the names of their weights: but for what diffusers keeps in fp32."""
    kept = set(cast("Any", transformer)._keep_in_fp32_modules or ())
    parts = cast("Iterable[tuple[str, nn.Module]]", transformer.named_modules())
    return {
        f"{name}.weight": part
        for name, part in parts
        if isinstance(part, nn.Linear) and not kept.intersection(name.split("."))
    }


def _named_as_diffusers(file: Path, tensors: TensorsByName) -> TensorsByName:
    prefix = next((it for it in _PREFIXES if any(name.startswith(it) for name in tensors)), "")
    plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if any(name.startswith(_OF_DIFFUSERS) for name in plain):
        return plain
    from diffusers.loaders import single_file_utils

    converted: Any = single_file_utils
    try:
        return converted.convert_wan_transformer_to_diffusers(plain)
    # Some models beside Wan's own have weights that it would split.
    except (TypeError, AttributeError) as error:
        raise ModelFolderError(f"{file} is not of a Wan image-to-video transformer", _ANOTHER) from error


def _check(file: Path, tensors: TensorsByName, transformer: nn.Module) -> None:
    """Raise `ModelFolderError` unless the file holds the transformer's weights, all of them, and no others."""
    expected: Mapping[str, Tensor] = transformer.state_dict()
    if not expected.keys() & tensors.keys():
        names = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise ModelFolderError(f"{file} holds no Wan transformer: it has {names}", _ANOTHER)
    if _INPUT in tensors and tensors[_INPUT].shape[1:2] != expected[_INPUT].shape[1:2]:
        channels, wanted = tensors[_INPUT].shape[1], expected[_INPUT].shape[1]
        raise ModelFolderError(
            f"the transformer in {file} takes {channels} channels, not {wanted}"
            + (": it makes videos of text alone" if channels < wanted else ""),
            _ANOTHER,
        )
    missing, strange = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        raise ModelFolderError(
            f"{file} lacks {len(missing)} of the transformer's weights, such as {missing[0]}", _ANOTHER
        )
    if strange:
        raise ModelFolderError(f"{file} holds {len(strange)} weights of another model, such as {strange[0]}", _ANOTHER)
    for name, tensor in tensors.items():
        if tensor.shape != tuple(expected[name].shape):
            raise ModelFolderError(f"{name} in {file} is {tensor.shape}, not {tuple(expected[name].shape)}", _ANOTHER)
