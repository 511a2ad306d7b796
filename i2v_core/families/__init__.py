"""Model families: one file each. The table below is the only place that lists them."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelFolderError
from .base import Conditioning, Family, Place, Placed, Prompt, TensorMap, Workload
from .facts import FamilyFacts, LatentSize, VideoSize
from .folder import read_json
from .i2vgen_xl import I2VGenXL
from .model import Architecture, I2VModel

FAMILIES: dict[str, Family] = {family.facts.name: family for family in (I2VGenXL(),)}


def family_of(architecture: Architecture) -> Family:
    return FAMILIES[architecture.family]


def bundled_architecture(name: str) -> Architecture:
    """The architecture of a family's published model, which is all that planning needs: no weights."""
    file = Path(__file__).parent / "architectures" / f"{name}.json"
    return Architecture.from_configs(name, read_json(file))


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
    "family_of",
    "load_model",
    "read_architecture",
]
