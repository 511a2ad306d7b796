"""What the tests that all families share need to know of one model.

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
"""A tensor of any values of this shape."""


class LatentShape(NamedTuple):
    batch: int
    frames: int
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserSubject:
    """One kind of denoiser.

    `config` is that of a small one, `other_layout` what makes another of it, as deep as the published. `make_inputs`
    gives the arguments of its forward, by its config. `latent_multiple` divides the sides of latents. `same_bits_from`
    is the workspace from which on the plain forward's result is had to the bit; None: never. `fewer_layers` leaves
    layers out of the published one that are as others. `more_arguments` are those that its forward takes beside the
    inputs. `bounds_gib` are what the published one may take at most, with all weights in place and with those of two
    layer calls, by width, height and frames.
    """

    cls: Callable[[], Any]
    chunked: Callable[..., AbstractContextManager[None]]
    config: Mapping[str, Any]
    other_layout: Mapping[str, Any]
    make_inputs: Callable[[LatentShape, Mapping[str, Any], Noise], Inputs]
    more_arguments: Mapping[str, Any]
    bounds_gib: Mapping[tuple[int, int, int], tuple[float, float]]
    latent_multiple: int = 1
    same_bits_from: int | None = None
    has_skips: bool = True
    fewer_layers: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def ways_with_skips(self) -> tuple[bool, ...]:
        """Whether to park them: both, where there are any."""
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
        """For a small one; sides are rounded down to what it takes."""
        generator = torch.Generator().manual_seed(1)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        height, width = (side - side % self.latent_multiple for side in (latent_height, latent_width))
        return self.make_inputs(LatentShape(batch, frames, height, width), self.config, noise)


class ReferencePipeline(Protocol):
    """What diffusers' own pipeline makes of the same noise, picture and settings: with `output_type` "latent", what we
    hand on as the host's LATENT, and with "pt" the frames (F, H, W, 3) in 0…1. `options` go to the pipeline.
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
    """A `before_reference` that changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model of random weights, small, of the real classes; and the published one that it stands for.

    `save` writes it into a folder in diffusers layout; keywords beside `seed` and `dtype` go to every
    `save_pretrained`. `published` names the bundled architecture. `before_reference` takes out of a loaded model what
    would make `reference` differ from us on purpose.
    """

    name: str
    published: str
    save: Callable[..., None]
    denoiser: DenoiserSubject
    reference: ReferencePipeline
    before_reference: Callable[[I2VModel], None] = nothing

    @cached_property
    def family(self) -> Family:
        return family_of(bundled_architecture(self.published))

    def size(self, width_pixels: int, height_pixels: int, frames: int) -> VideoSize:
        """The smallest video that the family makes and that holds this one."""
        facts = self.family.facts
        width, height = (
            -(-side // facts.size_multiple) * facts.size_multiple for side in (width_pixels, height_pixels)
        )
        rest = -(-(frames - 1) // facts.temporal_compression)
        return VideoSize(width_pixels=width, height_pixels=height, frames=1 + rest * facts.temporal_compression)

    def architecture(self, *, all_layers: bool = True) -> Architecture:
        """The published one; without `all_layers`, less those that are as others."""
        published = bundled_architecture(self.published)
        if all_layers:
            return published
        configs = {name: dict(published.config(name)) for name, _ in published.configs}
        configs[self.component] |= self.denoiser.fewer_layers
        return Architecture.from_configs(published.family, configs)

    @property
    def component(self) -> str:
        """The denoiser's name, of several the first."""
        return self.family.denoisers(bundled_architecture(self.published))[0].component

    def published_denoiser(self, dtype: torch.dtype, *, all_layers: bool = True) -> Any:
        """Without memory."""
        with torch.device("meta"):
            denoiser = self.denoiser.cls().from_config(self.architecture(all_layers=all_layers).config(self.component))
        return nn.Module.to(denoiser, dtype).eval().requires_grad_(False)

    def published_inputs(self, batch: int, size: VideoSize, dtype: torch.dtype) -> Inputs:
        """Meta inputs."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device="meta", dtype=dtype)

        _, _, frames, height, width = self.family.facts.latent_size(size).shape_bcthw
        config = self.architecture().config(self.component)
        inputs = self.denoiser.make_inputs(LatentShape(batch, frames, height, width), config, empty)
        return {name: tensor.to("meta") for name, tensor in inputs.items()}


def load_with_every_parameter(folder: Path) -> I2VModel:
    """The model in the folder, with denoisers of which every parameter matters."""
    model = load_model(folder)
    for denoiser in family_of(model.architecture).denoisers(model.architecture):
        make_every_parameter_matter(model.modules[denoiser.component])
    return model


def make_every_parameter_matter(module: nn.Module) -> None:
    """diffusers starts some at zero, which would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(0.5).add_(noise, alpha=0.5 / max(1, parameter[0].numel()) ** 0.5)
