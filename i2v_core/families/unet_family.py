"""Base class for families with a UNet and an image autoencoder, so that there are as many latent frames as pixel
frames.

Shape legend: B clips, C latent channels, T latent frames (= pixel frames), H/W latent size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..decoding import supports_row_tiles
from . import autoencoder_kl
from .base import Denoiser, TensorMap
from .facts import FamilyFacts
from .folder import (
    ComponentSpec,
    check_folder,
    configs_read,
    load_diffusers,
    load_transformers,
    pipeline_class,
    read_json,
)
from .model import NO_FILES, Architecture, I2VModel, WeightFiles

DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
_CONFIG_FILES = {
    "tokenizer": "tokenizer_config.json",
    "feature_extractor": "preprocessor_config.json",
    "scheduler": "scheduler_config.json",
}
_OF_DIFFUSERS = ("unet", "vae")


class UNetFamily(ABC):
    """The parts of `base.Family` that UNet families share: reading folders, and latents with frames on the batch axis.

    `i2vgen_xl.py` and `svd.py` are examples of subclasses.
    """

    facts: ClassVar[FamilyFacts]

    components: ClassVar[tuple[ComponentSpec, ...]]
    """Files that a folder must hold."""

    pipeline: ClassVar[str]
    """Class name of diffusers' pipeline."""

    unet: ClassVar[str]
    """Class name of diffusers' UNet."""

    decoder = "vae"

    @abstractmethod
    def module_classes(self) -> Mapping[str, Any]:
        """Return classes by component.

        To be imported here: diffusers and transformers take seconds to import, which would delay the host's start.
        """

    @abstractmethod
    def check_configs(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise any error unless the values that are read of the configs later can be read."""

    def tokenizer(self, folder: Path) -> Any:  # noqa: ARG002
        """Load the model's tokenizer; None if it has none."""
        return None

    def denoisers(self, architecture: Architecture) -> tuple[Denoiser, ...]:  # noqa: ARG002
        return (Denoiser(component="unet"),)

    def recognises(self, folder: Path) -> bool:
        if pipeline_class(folder) is not None:
            return pipeline_class(folder) == self.pipeline
        config = folder / "unet" / "config.json"
        return config.is_file() and read_json(config).get("_class_name") == self.unet

    def architecture(self, folder: Path, files: WeightFiles = NO_FILES) -> Architecture:  # noqa: ARG002
        configs = {
            component.name: read_json(folder / component.name / _CONFIG_FILES.get(component.name, "config.json"))
            for component in self.components
        }
        with configs_read(folder):
            self.check_configs(configs)
        return Architecture.from_configs(self.facts.name, configs)

    def load(self, folder: Path, files: WeightFiles = NO_FILES) -> I2VModel:  # noqa: ARG002
        weights = check_folder(folder, self.components)
        architecture = self.architecture(folder)
        modules = {
            name: (load_diffusers if name in _OF_DIFFUSERS else load_transformers)(cls, weights[name])
            for name, cls in self.module_classes().items()
        }
        return I2VModel(architecture=architecture, folder=folder, modules=modules, tokenizer=self.tokenizer(folder))

    def stored_weights(self, weights: str, config: Mapping[str, Any]) -> dict[str, list[str]]:  # noqa: ARG002
        raise AssertionError("no component is in `facts.from_files`")

    def skeleton(self, architecture: Architecture, component: str) -> nn.Module:
        cls, config = self.module_classes()[component], architecture.config(component)
        if component in _OF_DIFFUSERS:
            return cls.from_config(config).eval()
        return cls(cls.config_class.from_dict(config)).eval()

    def supports_tiling(self, architecture: Architecture) -> bool:
        return supports_row_tiles(architecture.config("vae"))

    def latents_to_host(
        self,
        architecture: Architecture,
        latents_BCTHW: Tensor,
        inputs: TensorMap,  # noqa: ARG002
    ) -> Tensor:
        return latents_BCTHW[0].transpose(0, 1) / autoencoder_kl.scaling_factor(architecture.config("vae"))

    def decoded_frames(self, samples: Tensor) -> int:
        return len(samples)
