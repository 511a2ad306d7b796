"""The model that jobs need, loaded once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...families import I2VModel
from ...placement.swap import all_tensors


class ModelCache:
    """Loads models as jobs ask for them, from any thread; of those, the last is kept."""

    def __init__(self, load: Callable[[Path], I2VModel]) -> None:
        self._load = load
        self._turn = threading.Lock()
        self._last: tuple[Path, I2VModel] | None = None

    def model(self, folder: Path) -> I2VModel:
        """Raises `ModelFolderError` where there is none."""
        with self._turn:
            if self._last is None or self._last[0] != folder:
                self._last = None  # the former's memory first
                self._last = folder, self._load(folder)
            return self._last[1]


def replicate(model: I2VModel) -> I2VModel:
    """The model again: modules and tokenizer of its own, whose weights lie where the model's lie.

    Placing, streaming and chunking change modules while a stage runs; of a twin they change nothing that others see.
    """
    return replace(
        model,
        modules={name: _twin(module) for name, module in model.modules.items()},
        tokenizer=copy.deepcopy(model.tokenizer),
    )


def _twin(module: nn.Module) -> nn.Module:
    shared: dict[int, Any] = {id(tensor): _sharing(tensor) for tensor in all_tensors(module)}
    return copy.deepcopy(module, shared)


def _sharing(tensor: Tensor) -> Tensor:
    """Another tensor object of the same storage."""
    other = tensor.detach()
    return nn.Parameter(other, requires_grad=False) if isinstance(tensor, nn.Parameter) else other
