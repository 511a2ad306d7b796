"""Model families: one module or package each in this folder, which defines an object `FAMILY`, or several in
`FAMILIES`.

Families are discovered by these names, so a new one needs no registration.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path

from ..errors import BadInputError, ModelFolderError
from .base import Conditioning, Denoiser, Family, Place, Placed, Prompt, TensorMap, Workload
from .facts import FamilyFacts, LatentSize, VideoSize
from .folder import read_json
from .model import NO_FILES, Architecture, I2VModel, WeightFiles

_ARCHITECTURES = Path(__file__).parent / "architectures"


def _families() -> dict[str, Family]:
    modules = (import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    made: list[Family] = []
    for module in modules:
        made += [module.FAMILY] if hasattr(module, "FAMILY") else getattr(module, "FAMILIES", ())
    return {family.facts.name: family for family in sorted(made, key=lambda it: it.facts.name)}


FAMILIES: dict[str, Family] = _families()


def family_of(architecture: Architecture) -> Family:
    """Return the family that an architecture belongs to."""
    return FAMILIES[architecture.family]


def bundled_models() -> list[str]:
    """Return the names of the published models whose architectures are bundled."""
    return sorted(file.stem for file in _ARCHITECTURES.glob("*.json"))


def bundled_architecture(name: str) -> Architecture:
    """Return the architecture of a published model, which is all that planning needs; there are no weights.

    A file is named after its family, or names it in the key `family`.
    """
    configs = read_json(_ARCHITECTURES / f"{name}.json")
    return Architecture.from_configs(configs.pop("family", name), configs)


def with_weights(architecture: Architecture, weights: str) -> Architecture:
    """Return the architecture with quantised denoiser weights, for a plan.

    Args:
        architecture: the architecture with weights of any format.
        weights: a file of weights, or the name of one format for all of them.

    Raises:
        BadInputError: the model takes no quantised weights, or there is no such format.
        ModelFolderError: the file cannot be used.
        MissingPackageError: the package gguf is needed.
    """
    family = family_of(architecture)
    components = sorted(family.facts.from_files.intersection(name for name, _ in architecture.configs))
    if not components:
        raise BadInputError(f"{family.facts.display_name} takes no quantised weights", "plan without them")
    return architecture.with_stored({it: family.stored_weights(weights, architecture.config(it)) for it in components})


def load_model(folder: Path, files: WeightFiles = NO_FILES) -> I2VModel:
    """Load a model folder in diffusers layout into host RAM, with the weights of components in `files` from these.

    Raises:
        ModelFolderError: no such folder, no known family, or files that are missing, damaged or refused.
        BadInputError: a file is given for a component that takes none.
        MissingPackageError: a file needs a package that is not installed.
    """
    return _family_for(folder, files).load(folder, files)


def read_architecture(folder: Path, files: WeightFiles = NO_FILES) -> Architecture:
    """Return the architecture of a model, without reading weights. Raises as `load_model` does."""
    return _family_for(folder, files).architecture(folder, files)


def _family_for(folder: Path, files: WeightFiles) -> Family:
    family = _family_in(folder)
    for component, file in files.items():
        if component not in family.facts.from_files:
            raise BadInputError(
                f"{family.facts.display_name} takes no file for its {component}, and {file} is given",
                "leave the file out, or choose the folder of a Wan model",
            )
    return family


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
    "NO_FILES",
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
    "WeightFiles",
    "Workload",
    "bundled_architecture",
    "bundled_models",
    "family_of",
    "load_model",
    "read_architecture",
    "with_weights",
]
