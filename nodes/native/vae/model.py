"""The protocol of a native autoencoder, and the search for it: one file a model, with a tuple named `VAE_MODELS`."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Protocol, TypeAlias

import torch
from torch import nn

from ..model import imported
from .bands import BandedPass

Write: TypeAlias = Callable[[slice, slice, torch.Tensor], None]
"""Takes frames, rows, and the pixels (C, F, r, W) of these; to be called for every row of every frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """Pixels to encode."""

    frames: int
    height: int
    width: int
    read: Callable[[slice], torch.Tensor]
    """Returns some frames (1, C, F, H, W) on the device, in the range and the precision of the autoencoder."""


class NativeVAE(Protocol):
    """One of core's autoencoder classes, run in bands.

    A file in this folder implements it:

        class Wan21VAE:
            name = "Wan 2.1 VAE"
            def recognises(self, model): return type(model) is core.WanVAE
            ...

        VAE_MODELS = (Wan21VAE(),)
    """

    @property
    def name(self) -> str: ...

    @property
    def steady_latent_frames(self) -> int | None:
        """Latent frames after which the peak in bands does not rise further. None: it depends on all."""
        ...

    def recognises(self, model: nn.Module) -> bool:
        """Whether this file knows an autoencoder, each of its layers being of core's own class."""
        ...

    def pixel_channels(self, model: nn.Module) -> int:
        """Channels of the decoded pixels."""
        ...

    def latent_frames(self, frames: int) -> int:
        """Latent frames that so many frames are encoded to."""
        ...

    def frames(self, latent_frames: int) -> int:
        """Frames that so many latent frames decode to."""
        ...

    def decode(self, model: nn.Module, latent_1CThw: torch.Tensor, banded: BandedPass, write: Write) -> None:
        """Decode a latent, which may be in host memory."""
        ...

    def encode(self, model: nn.Module, video: Video, banded: BandedPass) -> torch.Tensor:
        """Encode a video; the latent (1, C, T, h, w) is in host memory."""
        ...


def native_vae(model: nn.Module) -> NativeVAE | None:
    """The file that knows an autoencoder; None where there is none."""
    return next((found for found in _models() if found.recognises(model)), None)


@cache
def _models() -> tuple[NativeVAE, ...]:
    package = __name__.rpartition(".")[0]
    modules = (imported(f"{package}.{found.name}") for found in pkgutil.iter_modules(import_module(package).__path__))
    return tuple(found for module in modules for found in getattr(module, "VAE_MODELS", ()))
