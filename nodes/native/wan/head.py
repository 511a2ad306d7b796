"""The last layer of Wan's models, in chunks of tokens."""

from __future__ import annotations

from typing import Any

from comfy.ldm.wan import model as core
from torch import Tensor

from ..calls import CallState
from .modulation import modulated, modulation


class Head:
    """`Head.forward`, a chunk of tokens at a time."""

    def __init__(self, head: Any, state: CallState) -> None:
        self._head, self._state = head, state

    def __call__(self, x: Tensor, e: Tensor) -> Tensor:
        if not self._state.chunked:
            return core.Head.forward(self._head, x, e)
        batch, total, width = x.shape
        out = x.new_empty(batch, total, self._head.head.out_features)
        shift, scale = modulation(self._head.modulation, e, x, rows=2)
        unit_bytes = 3 * batch * width * x.element_size()
        with self._state.tokens("head", self._head.head, total=total, unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                out[:, tokens] = self._head.head(modulated(x, self._head.norm, shift, scale, tokens))
        return out
