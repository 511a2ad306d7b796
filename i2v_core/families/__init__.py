"""Model families: one file each in this folder, which makes an object named `FAMILY`. No list of them is kept."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path

from ..errors import ModelFolderError
from .base import Conditioning, Denoiser, Family, Place, Placed, Prompt, TensorMap, Workload
from .facts import FamilyFacts, LatentSize, VideoSize
from .folder import read_json
from .model import Architecture, I2VModel

_ARCHITECTURES = Path(__file__).parent / "architectures"


def _families() -> dict[str, Family]:
    modules = (import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    made: list[Family] = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.facts.name: family for family in sorted(made, key=lambda it: it.facts.name)}


FAMILIES: dict[str, Family] = _families()


def family_of(architecture: Architecture) -> Family:
    return FAMILIES[architecture.family]


def bundled_models() -> list[str]:
    """Names of the published models whose architecture is bundled."""
    return sorted(file.stem for file in _ARCHITECTURES.glob("*.json"))


def bundled_architecture(name: str) -> Architecture:
    """The architecture of a published model, which is all that planning needs: no weights.

    A file is named after its family, or says under `family` what that is.
    """
    configs = read_json(_ARCHITECTURES / f"{name}.json")
    return Architecture.from_configs(configs.pop("family", name), configs)


def load_model(folder: Path) -> I2VModel:
    """Load a model folder in diffusers layout into host RAM.

    Raises:
        ModelFolderError: no such folder, no known family, or files that are missing, damaged or refused.
    """
    return _family_in(folder).load(folder)


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a model folder, without reading weights.

    Raises:
        ModelFolderError: no such folder, no known family, or configs that are missing or damaged.
    """
    return _family_in(folder).architecture(folder)


def _family_in(folder: Path) -> Family:
    if not folder.is_dir():
        raise ModelFolderError(f"the model folder {folder} does not exist", "choose another model in I2V Loader")
    for family in FAMILIES.values():
        if family.recognises(folder):
            return family
    known = ", ".join(family.facts.display_name for family in FAMILIES.values())
    raise ModelFolderError(
        f"{folder} is not a model that this pack knows", f"use a folder in diffusers layout of one of: {known}"
    )


__all__ = [
    "FAMILIES",
    "Architecture",
    "Conditioning",
    "Denoiser",
    "Family",
    "FamilyFacts",
    "I2VModel",
    "LatentSize",
    "Place",
    "Placed",
    "Prompt",
    "TensorMap",
    "VideoSize",
    "Workload",
    "bundled_architecture",
    "bundled_models",
    "family_of",
    "load_model",
    "read_architecture",
]
