"""Small configurations of core's models, one file a native model; each file has a dictionary `CASES` by name."""

from __future__ import annotations

import importlib
import pkgutil

from comfy_host.model_case import ModelCase


def small_models() -> dict[str, ModelCase]:
    """All small models, by a name such as `wan-i2v`."""
    found: dict[str, ModelCase] = {}
    for module in pkgutil.iter_modules(__path__):
        cases: dict[str, ModelCase] = importlib.import_module(f"{__name__}.{module.name}").CASES
        found |= {f"{module.name}-{name}": case for name, case in cases.items()}
    return found
