"""Loading a Wan transformer from a single GGUF or safetensors file of weights, as published for other nodes.

The file may name its weights as the published code does, or as diffusers does. Quantised weights stay quantised in
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
_DIFFUSERS_PREFIX = "condition_embedder."
_INPUT = "patch_embedding.weight"
# Formats by users' names for them, since files are also named after the size of their mixture of formats.
_FORMATS = {"FP8": "F8_E4M3"} | {f"Q{bits}_K_{size}": f"Q{bits}_K" for bits in (3, 4, 5) for size in "SML"}
_CHOOSE_ANOTHER = "choose the file of the model whose folder is chosen"


def tensors_of(file: Path, config: Mapping[str, Any]) -> TensorsByName:
    """Return the file's tensors for a transformer of this config, by diffusers' names, without reading their values.

    Raises:
        ModelFolderError: the file is damaged, of another model, or in a format that cannot be used.
        MissingPackageError: the package gguf is needed.
    """
    tensors = _named_as_diffusers(file, read_tensors(file))
    _check(file, tensors, _skeleton(config))
    return tensors


def quantized_in(tensors: TensorsByName, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names of the weights that stay quantised, by format."""
    layers = _linear_layers(_skeleton(config))
    found: dict[str, list[str]] = {}
    for name, tensor in sorted(tensors.items()):
        if tensor.format is not None and name in layers:
            found.setdefault(tensor.format, []).append(name)
    return found


def weights_by_format(weights: str, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names of quantised weights by format, for a plan without a model.

    Args:
        weights: a file, or the name of a format, which all weights of the blocks are then in, as are most of a file of
            4 to 8 bits.
        config: the transformer's config.

    Raises:
        BadInputError: there is no such format, or rows of weights are not divisible by its blocks.
        ModelFolderError: the file is damaged, or of another model.
        MissingPackageError: the package gguf is needed.
    """
    if Path(weights).suffix.lower() in SUFFIXES:
        return quantized_in(tensors_of(Path(weights), config), config)
    format_name = _FORMATS.get(weights.upper(), weights.upper())
    layers = {name: it for name, it in _linear_layers(_skeleton(config)).items() if name.startswith("blocks.")}
    numbers, _ = block_of(format_name)
    if any(layer.in_features % numbers for layer in layers.values()):
        raise BadInputError(
            f"the model's weights are not divisible by the blocks of {format_name}", "choose another format"
        )
    return {format_name: sorted(layers)}


def set_storage_formats(transformer: nn.Module, stored: Mapping[str, list[str]]) -> None:
    """Mark the layers of a transformer without weights with the formats that `quantized_in` returned."""
    layers = _linear_layers(transformer)
    for format_name, names in stored.items():
        for name in names:
            layer = layers[name]
            set_storage_format(layer, Quantized(format=format_name, rows=layer.out_features, columns=layer.in_features))


def load(tensors: TensorsByName, config: Mapping[str, Any]) -> nn.Module:
    """Return the transformer in host RAM, with its weights in the file's formats."""
    import accelerate as untyped  # pyright: ignore[reportMissingTypeStubs]

    accelerate: Any = untyped
    with accelerate.init_empty_weights():
        transformer = _class().from_config(config)
    layers = _linear_layers(transformer)
    for name, tensor in tensors.items():
        owner, _, own_name = name.rpartition(".")
        stored = tensor.read()
        form = _form(tensor)
        if form is not None and name in layers:
            set_storage_format(layers[name], form)
        elif form is not None:
            stored = form.dequantized(stored, torch.float32).view(tensor.shape)
        setattr(transformer.get_submodule(owner), own_name, nn.Parameter(stored, requires_grad=False))
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
    """Return layers whose weights may stay quantised, by weight name; excludes those that diffusers keeps in fp32."""
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
    if any(name.startswith(_DIFFUSERS_PREFIX) for name in plain):
        return plain
    from diffusers.loaders import single_file_utils

    converted: Any = single_file_utils
    try:
        return converted.convert_wan_transformer_to_diffusers(plain)
    # The conversion fails for other models whose weights have the names of those that it splits.
    except (TypeError, AttributeError) as error:
        raise ModelFolderError(f"{file} is not of a Wan image-to-video transformer", _CHOOSE_ANOTHER) from error


def _check(file: Path, tensors: TensorsByName, transformer: nn.Module) -> None:
    """Raise `ModelFolderError` unless the file holds exactly the transformer's weights."""
    expected: Mapping[str, Tensor] = transformer.state_dict()
    if not expected.keys() & tensors.keys():
        names = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise ModelFolderError(f"{file} holds no Wan transformer: it has {names}", _CHOOSE_ANOTHER)
    if _INPUT in tensors and tensors[_INPUT].shape[1:2] != expected[_INPUT].shape[1:2]:
        channels, wanted = tensors[_INPUT].shape[1], expected[_INPUT].shape[1]
        raise ModelFolderError(
            f"the transformer in {file} takes {channels} channels, not {wanted}"
            + (": it makes videos of text alone" if channels < wanted else ""),
            _CHOOSE_ANOTHER,
        )
    missing, strange = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        raise ModelFolderError(
            f"{file} lacks {len(missing)} of the transformer's weights, such as {missing[0]}", _CHOOSE_ANOTHER
        )
    if strange:
        raise ModelFolderError(
            f"{file} holds {len(strange)} weights of another model, such as {strange[0]}", _CHOOSE_ANOTHER
        )
    for name, tensor in tensors.items():
        if tensor.shape != tuple(expected[name].shape):
            raise ModelFolderError(
                f"{name} in {file} is {tensor.shape}, not {tuple(expected[name].shape)}", _CHOOSE_ANOTHER
            )
