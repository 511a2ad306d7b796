"""Models that jobs need: loaded once, and replicated where several stages use one at the same time."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...families import I2VModel
from ...placement.swap import all_tensors


class ModelCache:
    """Loads models on demand, from any thread, and keeps the last one."""

    def __init__(self, load: Callable[[Path], I2VModel]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._last: tuple[Path, I2VModel] | None = None

    def model(self, folder: Path) -> I2VModel:
        """Raises `ModelFolderError` where there is none."""
        with self._lock:
            if self._last is None or self._last[0] != folder:
                self._last = None  # frees its memory before the next is loaded
                self._last = folder, self._load(folder)
            return self._last[1]


class ModelReplicas:
    """One thread's replica of each model it meets; keeps the last one."""

    def __init__(self) -> None:
        self._of: Mapping[int, tuple[I2VModel, I2VModel]] = {}

    def of(self, model: I2VModel) -> I2VModel:
        if id(model) not in self._of:
            self._of = {id(model): (model, replicate(model))}
        return self._of[id(model)][1]


def replicate(model: I2VModel) -> I2VModel:
    """Module copies that share weight storage with the model, so that two stages can use one model at once.

    Placing, streaming and chunking change modules while a stage runs. Changes to a replica are not seen by others.
    """
    return replace(
        model,
        modules={name: _replica(module) for name, module in model.modules.items()},
        tokenizer=copy.deepcopy(model.tokenizer),
    )


def _replica(module: nn.Module) -> nn.Module:
    shared: dict[int, Any] = {id(tensor): _sharing_storage(tensor) for tensor in all_tensors(module)}
    return copy.deepcopy(module, shared)


def _sharing_storage(tensor: Tensor) -> Tensor:
    other = tensor.detach()
    return nn.Parameter(other, requires_grad=False) if isinstance(tensor, nn.Parameter) else other
