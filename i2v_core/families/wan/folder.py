"""Reading and loading a Wan model's folder in diffusers layout.

A transformer's weights may come from a file of their own instead, which is given, or is alone in the transformer's
folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from ...errors import BadInputError
from ..folder import (
    ComponentSpec,
    check_folder,
    configs_read,
    load_diffusers,
    load_tokenizer,
    load_transformers,
    read_json,
)
from ..model import NO_FILES, Architecture, I2VModel, WeightFiles
from . import weight_file

_DIFFUSERS_STEM, _TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
_TRANSFORMER, _EXPERT = (
    ComponentSpec(name=name, weights_stem=_DIFFUSERS_STEM) for name in ("transformer", "transformer_2")
)
_ALWAYS = (
    _TRANSFORMER,
    ComponentSpec(name="vae", weights_stem=_DIFFUSERS_STEM),
    ComponentSpec(name="text_encoder", weights_stem=_TRANSFORMERS_STEM),
    ComponentSpec(name="tokenizer", files=("tokenizer_config.json", "tokenizer.json|spiece.model")),
    ComponentSpec(name="scheduler", files=("scheduler_config.json",)),
)
_VISION = (
    ComponentSpec(name="image_encoder", weights_stem=_TRANSFORMERS_STEM),
    ComponentSpec(name="image_processor", files=("preprocessor_config.json",)),
)
_CONFIG_FILES = {
    "tokenizer": "tokenizer_config.json",
    "image_processor": "preprocessor_config.json",
    "scheduler": "scheduler_config.json",
}
# Keys of model_index.json: when the second expert takes over, and whether each token has a time step of its own.
_PIPELINE_KEYS = ("boundary_ratio", "expand_timesteps")


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the components' configs by name, and under `pipeline` the sampling options in model_index.json.

    Raises:
        ModelFolderError: a config is missing or damaged, or holds values that make no model.
    """
    configs = {
        component.name: read_json(folder / component.name / _CONFIG_FILES.get(component.name, "config.json"))
        for component in _components(folder)
    }
    index = read_json(folder / "model_index.json")
    configs["pipeline"] = {name: index[name] for name in _PIPELINE_KEYS if index.get(name) is not None}
    _check(folder, configs)
    return configs


def quantized_weight_names(
    folder: Path, configs: Mapping[str, Mapping[str, Any]], files: WeightFiles
) -> dict[str, dict[str, list[str]]]:
    """Return the names of the weights that files hold quantised, by transformer and format.

    Raises:
        BadInputError: a file is given for a transformer that the model does not have.
        ModelFolderError: a file is damaged, or not the transformer's.
    """
    files_by_name = _files(folder, configs, files)
    return {
        name: weight_file.quantized_in(weight_file.tensors_of(file, configs[name]), configs[name])
        for name, file in files_by_name.items()
    }


def load_folder(folder: Path, architecture: Architecture, files: WeightFiles = NO_FILES) -> I2VModel:
    """Load a folder into host RAM. Raises `ModelFolderError` that names every missing or damaged file."""
    from transformers import AutoTokenizer

    configs = {component.name: architecture.config(component.name) for component in _components(folder)}
    found = _files(folder, configs, files)
    needed = (replace(it, weights_stem=None) if it.name in found else it for it in _components(folder))
    weights = check_folder(folder, needed)
    classes = _module_classes()
    modules = {
        name: weight_file.load(weight_file.tensors_of(file, configs[name]), configs[name])
        for name, file in found.items()
    }
    modules |= {
        name: (load_transformers if name in ("text_encoder", "image_encoder") else load_diffusers)(classes[name], it)
        for name, it in weights.items()
    }
    return I2VModel(
        architecture=architecture,
        folder=folder,
        modules=modules,
        tokenizer=load_tokenizer(AutoTokenizer, folder / "tokenizer"),
        files=tuple(files.values()),
    )


def make_skeleton(architecture: Architecture, component: str) -> nn.Module:
    """Return a component without weights; see `base.Family.skeleton`."""
    cls, config = _module_classes()[component], architecture.config(component)
    if component in ("text_encoder", "image_encoder"):
        return cls(cls.config_class.from_dict(config)).eval()
    module: nn.Module = cls.from_config(config).eval()
    weight_file.set_storage_formats(module, architecture.stored.get(component, {}))
    return module


def vision_pixels(architecture: Architecture, picture: Image.Image) -> Tensor:
    """Return the picture (1, 3, H, W) as the vision encoder's own processor prepares it, on the CPU."""
    from transformers import CLIPImageProcessor

    processor: Any = CLIPImageProcessor
    config = architecture.config("image_processor")
    return processor.from_dict(config)(images=picture, return_tensors="pt").pixel_values


def _components(folder: Path) -> tuple[ComponentSpec, ...]:
    """Return the components that a folder must hold.

    There is a second expert if model_index.json has a boundary between two, and a vision encoder if the transformer
    takes its states.
    """
    two = read_json(folder / "model_index.json").get("boundary_ratio") is not None
    sees = read_json(folder / "transformer" / "config.json").get("image_dim") is not None
    return (*_ALWAYS, *((_EXPERT,) if two else ()), *(_VISION if sees else ()))


def _files(folder: Path, configs: Mapping[str, object], files: WeightFiles) -> dict[str, Path]:
    """Return the file of each transformer that has one."""
    for name, file in files.items():
        if name not in configs:
            raise BadInputError(
                f"the model in {folder} has no {name}, which {file} is given for", "leave that file out"
            )
    alone = {name: _alone_in(folder / name) for name in (_TRANSFORMER.name, _EXPERT.name) if name in configs}
    return {**{name: file for name, file in alone.items() if file is not None}, **files}


def _alone_in(folder: Path) -> Path | None:
    """Return the only GGUF file in a folder without weights in diffusers layout; None if there is none."""
    found = sorted(folder.glob("*.gguf"))
    return found[0] if len(found) == 1 and not any(folder.glob("*.safetensors*")) else None


def _module_classes() -> Mapping[str, Any]:
    """Return classes by component, imported here since diffusers and transformers would delay the host's start."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from transformers import CLIPVisionModel, UMT5EncoderModel

    return {
        "transformer": WanTransformer3DModel,
        "transformer_2": WanTransformer3DModel,
        "vae": AutoencoderKLWan,
        "text_encoder": UMT5EncoderModel,
        "image_encoder": CLIPVisionModel,
    }


def _check(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `ModelFolderError` unless the values that are read of the configs later can be read."""
    with configs_read(folder):
        channels, vae = int(configs["vae"].get("z_dim", 16)), configs["vae"]
        statistics = [float(value) for name in ("latents_mean", "latents_std") for value in vae[name]]
        if len(statistics) != 2 * channels:
            raise ValueError(f"{len(statistics)} values describe the distribution of {channels} latent channels")
        int(configs["transformer"]["text_dim"])
        float(configs["pipeline"].get("boundary_ratio", 0))
        if "image_encoder" in configs:
            vision = configs["image_encoder"]
            _ = int(vision["image_size"]) // int(vision["patch_size"])
