"""Whether a block may overwrite the hidden state that it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .model import is_own_method


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockInput:
    """The hidden state that a model's loop hands to one of its blocks.

    Example:
        source = BlockInput(model=model, plain=core.Kandinsky5, loop="forward_orig", before=None, ours=_Block)
        hidden = source.owned(x, transformer_options)  # x itself, or a copy where somebody else may hold it
    """

    model: nn.Module
    plain: type[nn.Module]
    """Core's class, whose loop keeps no reference to what it hands on; a subclass may."""
    loop: str
    """Name of the method with that loop."""
    before: nn.Module | None
    """The block that made the hidden state; None: the model itself did."""
    ours: type
    """Class of the replacement forwards, which keep no reference to their result."""

    def owned(self, hidden: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        """The hidden state to update in place."""
        if self._is_held(transformer_options):
            return hidden.clone(memory_format=torch.contiguous_format)
        return hidden

    def _is_held(self, transformer_options: dict[str, Any]) -> bool:
        if type(self.model) is not self.plain or not is_own_method(self.model, self.loop):
            return True
        if self.before is not None and type(self.before.__dict__.get("forward")) is not self.ours:
            return True  # a block that another node has replaced may keep its result, and return it in the next call
        replaced = transformer_options.get("patches_replace", {}).get("dit")
        return bool(replaced) or "double_block" in transformer_options.get("patches", {})
