"""A second hand on the same weights, so that two stages, or two devices, can use one loaded model at the same time."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..families import I2VModel
from ..placement.swap import all_tensors


def twin(model: I2VModel) -> I2VModel:
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
