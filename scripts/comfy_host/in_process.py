"""The host's model classes, and this pack's native models, in a process in which no server runs."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import setup


def native_modules(package: str) -> Callable[[str], Any]:
    """Make the host importable, on the CPU; returns what imports a module of this pack by its name below the root.

    The pack's packages come without their `__init__`, which wants the running server.

    Args:
        package: the name under which this pack is imported.

    Raises:
        SetupError: there is no host.
    """
    folder = str(setup.find(Path(sys.executable)).folder)
    if folder not in sys.path:
        sys.path.append(folder)
    arguments, sys.argv = sys.argv, sys.argv[:1]  # the host reads the command line when it is imported
    try:
        importlib.import_module("comfy.cli_args").args.cpu = True
    finally:
        sys.argv = arguments
    for name, path in ((package, setup.PACK), (f"{package}.nodes", setup.PACK / "nodes")):
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        sys.modules.setdefault(name, module)
    return lambda name: importlib.import_module(f"{package}.{name}")
