"""Keeping torch.compile out of what plans and records calls, but not out of the model beneath."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """Keeps torch.compile out of a function and of what it calls."""
    return cast(_Function, torch.compiler.disable(function))


def itself_uncompiled(function: _Function) -> _Function:
    """Keeps torch.compile out of a function, but not out of what it calls."""
    return cast(_Function, torch.compiler.disable(function, recursive=False))
