"""Models of tests that all families share.

Legend: B guidance branches, T latent frames, h/w latent size, F frames, H/W pixel size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from i2v_core.families import Architecture, I2VModel, Prompt, VideoSize, bundled_architecture, family_of, load_model
from i2v_core.families.base import Family

Inputs = dict[str, Any]
Noise = Callable[..., Tensor]
"""Returns a tensor of the given shape, with any values."""


class LatentShape(NamedTuple):
    batch: int
    frames: int
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserSubject:
    """One kind of denoiser."""

    cls: Callable[[], Any]
    chunked: Callable[..., AbstractContextManager[None]]

    config: Mapping[str, Any]
    """Config of a small denoiser."""

    other_layout: Mapping[str, Any]
    """Changes to `config` that make a denoiser as deep as the published one."""

    make_inputs: Callable[[LatentShape, Mapping[str, Any], Noise], Inputs]
    """Returns the arguments of the forward for a config."""

    more_arguments: Mapping[str, Any]
    """Arguments that the forward takes beside the inputs."""

    bounds_gib: Mapping[tuple[int, int, int], tuple[float, float]]
    """Bounds by width, height and frames: the most that the published denoiser may take: with all weights resident, and
    with those of two layer calls."""

    latent_multiple: int = 1
    """Number that the sides of latents must be divisible by."""

    same_bits_from: int | None = None
    """Workspace from which on the result equals the plain forward's to the bit; None: never."""

    has_skips: bool = True

    fewer_layers: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Changes to the published config that leave out layers that repeat others."""

    @property
    def offload_choices(self) -> tuple[bool, ...]:
        """Values of `offload_skips` to test."""
        return (False, True) if self.has_skips else (False,)

    def make(self, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        denoiser = self.cls()(**{**self.config, **changes})
        make_every_parameter_matter(denoiser)
        return nn.Module.to(denoiser, dtype).eval().requires_grad_(False)

    def inputs(
        self,
        *,
        batch: int = 1,
        frames: int = 5,
        latent_height: int = 8,
        latent_width: int = 8,
        dtype: torch.dtype = torch.float32,
    ) -> Inputs:
        """Return inputs for a small denoiser; sides are rounded down to the latent multiple."""
        generator = torch.Generator().manual_seed(1)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        height, width = (side - side % self.latent_multiple for side in (latent_height, latent_width))
        return self.make_inputs(LatentShape(batch, frames, height, width), self.config, noise)


class ReferencePipeline(Protocol):
    """Returns the result of diffusers' own pipeline for the same noise, picture and settings.

    That is the host's LATENT for `output_type` "latent", and the frames (F, H, W, 3) in 0…1 for "pt". `options` go to
    the pipeline.
    """

    def __call__(
        self,
        model: I2VModel,
        prompt: Prompt,
        size: VideoSize,
        *,
        steps: int,
        cfg: float,
        seed: int,
        scheduler: str,
        output_type: str,
        **options: Any,
    ) -> Tensor: ...


def nothing(model: I2VModel) -> None:
    """Change nothing: the default `before_reference`."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A small model of random weights of the real classes, and the published model that it stands for."""

    name: str

    published: str
    """Name of the bundled architecture."""

    save: Callable[..., None]
    """Writes the model to a folder in diffusers layout; keywords beside `seed` and `dtype` go to `save_pretrained`."""

    denoiser: DenoiserSubject
    reference: ReferencePipeline

    before_reference: Callable[[I2VModel], None] = nothing
    """Changes a loaded model so that intended differences from `reference` have no effect."""

    @cached_property
    def family(self) -> Family:
        return family_of(bundled_architecture(self.published))

    def size(self, width_pixels: int, height_pixels: int, frames: int) -> VideoSize:
        """Return the smallest video of the family that is at least this large."""
        facts = self.family.facts
        width, height = (
            -(-side // facts.size_multiple) * facts.size_multiple for side in (width_pixels, height_pixels)
        )
        rest = -(-(frames - 1) // facts.temporal_compression)
        return VideoSize(width_pixels=width, height_pixels=height, frames=1 + rest * facts.temporal_compression)

    def architecture(self, *, all_layers: bool = True) -> Architecture:
        """Return the published architecture; without `all_layers`, less layers that repeat others."""
        published = bundled_architecture(self.published)
        if all_layers:
            return published
        configs = {name: dict(published.config(name)) for name, _ in published.configs}
        configs[self.component] |= self.denoiser.fewer_layers
        return Architecture.from_configs(published.family, configs)

    @property
    def component(self) -> str:
        """Component name of the denoiser, of several the first."""
        return self.family.denoisers(bundled_architecture(self.published))[0].component

    def published_denoiser(self, dtype: torch.dtype, *, all_layers: bool = True) -> Any:
        """Return the published denoiser on the meta device."""
        with torch.device("meta"):
            denoiser = self.denoiser.cls().from_config(self.architecture(all_layers=all_layers).config(self.component))
        return nn.Module.to(denoiser, dtype).eval().requires_grad_(False)

    def published_inputs(self, batch: int, size: VideoSize, dtype: torch.dtype) -> Inputs:
        """Return inputs of the published denoiser on the meta device."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device="meta", dtype=dtype)

        _, _, frames, height, width = self.family.facts.latent_size(size).shape_bcthw
        config = self.architecture().config(self.component)
        inputs = self.denoiser.make_inputs(LatentShape(batch, frames, height, width), config, empty)
        return {name: tensor.to("meta") for name, tensor in inputs.items()}


def load_with_every_parameter(folder: Path) -> I2VModel:
    """Load the model in a folder, with denoisers in which every parameter matters."""
    model = load_model(folder)
    for denoiser in family_of(model.architecture).denoisers(model.architecture):
        make_every_parameter_matter(model.modules[denoiser.component])
    return model


def make_every_parameter_matter(module: nn.Module) -> None:
    """Randomise all parameters; diffusers initialises some to zero, which would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(0.5).add_(noise, alpha=0.5 / max(1, parameter[0].numel()) ** 0.5)
