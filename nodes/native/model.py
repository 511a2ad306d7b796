"""The protocol of a native model, and the search for it: one file a model, with an object named `MODEL`."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Protocol

from torch import nn

from .calls import CallState


@dataclass(frozen=True, slots=True)
class Patch:
    """A replacement for the forward of `module`, which lies at `path` below the diffusion model."""

    path: str
    module: nn.Module
    forward: Callable[..., Any]


class NativeModel(Protocol):
    """One of core's model classes, run in chunks.

    A file in this folder implements it:

        class Wan:
            name = "Wan"
            def recognises(self, model): return isinstance(model, core.WanModel)
            def block_lists(self, model): return ("blocks",)
            def patches(self, model, state): yield Patch("blocks.0", model.blocks[0], ...)

        MODEL = Wan()
    """

    @property
    def name(self) -> str: ...

    def recognises(self, model: nn.Module) -> bool:
        """Whether this file knows a diffusion model's class."""
        ...

    def block_lists(self, model: nn.Module) -> tuple[str, ...]:
        """Paths of the lists of equal blocks, of which two tell the memory of all."""
        ...

    def patches(self, model: nn.Module, state: CallState) -> Iterator[Patch]:
        """Replacement forwards for those parts of a model that are core's own classes."""
        ...


def is_own_forward(module: nn.Module) -> bool:
    """Whether a module runs its class's forward.

    An object patch that was taken back leaves the class's bound method in the instance, which is its own forward too.
    """
    forward = module.__dict__.get("forward")
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def native_model(model: nn.Module) -> NativeModel | None:
    """The file that knows a diffusion model; None where there is none."""
    return next((found for found in _models() if found.recognises(model)), None)


@cache
def _models() -> tuple[NativeModel, ...]:
    package = __name__.rpartition(".")[0]
    paths = import_module(package).__path__
    modules = (import_module(f"{package}.{found.name}") for found in pkgutil.iter_modules(paths))
    return tuple(module.MODEL for module in modules if hasattr(module, "MODEL"))
