"""Whether a block may overwrite the hidden state that it is given: only where nobody else holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .model import is_own_method


def comes_from_ours(model: nn.Module, loop: str, before: nn.Module | None, ours: type) -> bool:
    """Whether nothing of another node's has made a block's hidden state, or hands it on: it may keep what it gives.

    Args:
        loop: name of the model's method that calls the blocks.
        before: the block that made the hidden state; None: the model itself did.
        ours: class of the replacement forwards, which keep no reference to their result.
    """
    return is_own_method(model, loop) and (before is None or isinstance(before.__dict__.get("forward"), ours))


def is_watched(transformer_options: dict[str, Any]) -> bool:
    """Whether another node has put patches around blocks, which may hold what goes into them."""
    replaced = transformer_options.get("patches_replace", {}).get("dit")
    return bool(replaced) or "double_block" in transformer_options.get("patches", {})


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
        return (
            type(self.model) is not self.plain
            or not comes_from_ours(self.model, self.loop, self.before, self.ours)
            or is_watched(transformer_options)
        )
