"""The host's model classes and this pack's modules, in this process."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from comfy_host.in_process import native_modules

_PACKAGE = "i2v_native_corpus"


def pack_module(name: str) -> Any:
    """A module of this pack, by its name below the root."""
    _make_importable()
    return importlib.import_module(f"{_PACKAGE}.{name}")


def host_module(name: str) -> Any:
    """A module of the host."""
    _make_importable()
    return importlib.import_module(name)


@cache
def _make_importable() -> None:
    native_modules(_PACKAGE)
