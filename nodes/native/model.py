"""The protocol of a native model, and the search for it: one file or folder a model, with an object named `MODEL`."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from torch import nn

from .calls import CallState


@dataclass(frozen=True, slots=True)
class Patch:
    """A replacement for a method of `module`, which lies at `path` below the diffusion model."""

    path: str
    """Empty for the diffusion model itself."""
    module: nn.Module
    replacement: Callable[..., Any]
    method: str = "forward"

    @property
    def name(self) -> str:
        """Path of the method below the diffusion model."""
        return f"{self.path}.{self.method}" if self.path else self.method


class NativeModel(Protocol):
    """One of core's model classes, run in chunks.

    A file or folder beside this one implements it:

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
        """Replacements for methods of those parts of a model that are core's own classes."""
        ...


@runtime_checkable
class PreparesConditioning(Protocol):
    """A native model whose diffusion model also works on the conditioning before its first call."""

    def stand_ins(self, model: nn.Module) -> Mapping[str, Callable[..., Any]]:
        """Methods, by name, that return what those of the diffusion model do in shape, without the work."""
        ...


COPY_OF = "i2v_copy_of"
"""Attribute of what runs a method of core's in its place as core does: that method."""


def is_own_method(module: nn.Module, method: str = "forward") -> bool:
    """Whether a module runs its class's method."""
    return is_own(module.__dict__.get(method), module, method)


def is_own(found: Any, module: nn.Module, method: str = "forward") -> bool:
    """Whether what lies in the place of a module's method is its class's method; None: nothing lies there.

    An object patch that was taken back leaves the class's bound method in the instance, which is its own too.
    """
    function = getattr(found, "__func__", found)
    return found is None or getattr(function, COPY_OF, function) is getattr(type(module), method)


def own_method(module: nn.Module, method: str = "forward") -> Callable[..., Any]:
    """A module's method as its class has it, or the twin's copy of it, whatever has been put in its place."""
    found = module.__dict__.get(method)
    return found if found is not None and hasattr(found, COPY_OF) else getattr(type(module), method).__get__(module)


def is_plain(module: object, kind: type[nn.Module]) -> bool:
    """Whether a layer is exactly of core's class, and runs that class's forward."""
    return type(module) is kind and is_own_method(module)


def native_model(model: nn.Module) -> NativeModel | None:
    """The native model of a diffusion model's class; None where there is none."""
    return next((found for found in _models() if found.recognises(model)), None)


@cache
def _models() -> tuple[NativeModel, ...]:
    package = __name__.rpartition(".")[0]
    paths = import_module(package).__path__
    modules = (imported(f"{package}.{found.name}") for found in pkgutil.iter_modules(paths))
    return tuple(module.MODEL for module in modules if hasattr(module, "MODEL"))


def imported(name: str) -> Any:
    """A module of this folder; None where the host is older than the model that it is for."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("comfy.ldm."):
            return None
        raise
