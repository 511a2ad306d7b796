"""Cases to run or trace core's autoencoders by: a class, its arguments, and the shape of a latent."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock


@dataclass(frozen=True, slots=True, kw_only=True)
class VAECase:
    """One of core's autoencoder classes with an input."""

    module: str
    """Core's module in which its `VAE` finds the class."""
    kind: str
    """Name of the class there."""
    arguments: Mapping[str, Any]
    latent_shape: tuple[int, ...]
    """(B, C, T, h, w)."""
    downscale: int
    """Pixels for each latent pixel, on a side."""

    def vae(self, dtype: Any, device: Any, weight: Callable[[str, Any], Any]) -> Any:
        """Core's `VAE`, as its loaders make it from a file, each of whose tensors `weight` makes by name and shape."""
        module = importlib.import_module(self.module)
        kind = getattr(module, self.kind)
        shapes = kind(**self.arguments).state_dict()
        weights = {name: weight(name, it.shape) for name, it in shapes.items()}
        # Core takes some of the arguments from the file, and has others built in.
        with mock.patch.object(module, self.kind, side_effect=lambda **_: kind(**self.arguments)):
            return importlib.import_module("comfy.sd").VAE(sd=weights, device=device, dtype=dtype)
