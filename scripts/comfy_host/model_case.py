"""Cases to run or trace core's models by: a class, its configuration, and the input of a sampler."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCase:
    """One of core's models with an input.

    Example:
        case = ModelCase(
            supported_model="WAN21_T2V",
            config={"image_model": "wan2.1", "dim": 96, ...},
            latent_shape=(1, 16, 3, 16, 24),
            conditioning=lambda generator, shape: [torch.randn(1, 20, 4096, generator=generator), {}],
        )
        patcher = patcher_of(model_of(case, torch.float32, "cpu"))
    """

    supported_model: str
    """Name of the class in core's `supported_models`."""
    config: Mapping[str, Any]
    """Its configuration, as core detects it in a file."""
    latent_shape: tuple[int, ...]
    """(B, C, T, h, w) of the latent that is sampled."""
    conditioning: Callable[[Any, tuple[int, ...]], list[Any]]
    """Makes one branch's conditioning, an embedding and its options as core's nodes put it out, of a random generator
    and the latent's shape.
    """
    audio_latent_shape: tuple[int, ...] | None = None
    """Of the audio latent that is sampled with the video's, for models that make both."""

    @property
    def exists(self) -> bool:
        """Whether this version of core has the model."""
        return hasattr(importlib.import_module("comfy.supported_models"), self.supported_model)


def model_of(case: ModelCase, dtype: Any, device: str, *, compute_dtype: Any = None) -> Any:
    """Core's `BaseModel` of a case, its weights as they were allocated."""
    chosen = getattr(importlib.import_module("comfy.supported_models"), case.supported_model)(dict(case.config))
    chosen.set_inference_dtype(dtype, compute_dtype)
    return chosen.get_model({}, "", device=device)


def latent_of(case: ModelCase, make: Callable[[tuple[int, ...]], Any]) -> Any:
    """The latent of a case, each of its parts made by `make` from a shape; nested as core has video with audio."""
    if case.audio_latent_shape is None:
        return make(case.latent_shape)
    nested = importlib.import_module("comfy.nested_tensor").NestedTensor
    return nested([make(case.latent_shape), make(case.audio_latent_shape)])


def sampler_input(case: ModelCase) -> tuple[tuple[int, ...], dict[str, Any], list[tuple[int, ...]]]:
    """Shape of the latent as samplers see it, one branch's conditioning, and the shapes of the latent's parts."""
    torch = importlib.import_module("torch")
    helpers, utils = (importlib.import_module(f"comfy.{name}") for name in ("sampler_helpers", "utils"))
    latent = latent_of(case, torch.zeros)
    packed, shapes = utils.pack_latents(latent.unbind()) if latent.is_nested else (latent, [latent.shape])
    conditioning = case.conditioning(torch.Generator(), case.latent_shape)
    return tuple(packed.shape), {"positive": helpers.convert_cond([conditioning])}, shapes
