"""Core's models at their real size, one file a native model; each file has a list `CASES` of named sizes."""

from __future__ import annotations

import importlib
import pkgutil

from comfy_host.model_case import ModelCase

NamedCase = tuple[str, str, ModelCase]
"""Name of the model, size of the clip in pixels and frames, and the case."""


def real_models() -> list[NamedCase]:
    """All cases, those of a model together."""
    modules = pkgutil.iter_modules(__path__)
    return [case for it in modules for case in importlib.import_module(f"{__name__}.{it.name}").CASES]
