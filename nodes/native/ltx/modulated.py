"""Hidden states of core's LTX models with the shifts, scales and gates of their layers, in core's order of rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from comfy.ldm.common_dit import rms_norm
from torch import Tensor

from .attention import Add, Tokens
from .rotary import Rotary
from .timesteps import TokenTimesteps


@dataclass(frozen=True, slots=True)
class ModulatedState:
    """A hidden state, and what a block's table and the time steps make of it."""

    hidden: Tensor
    """(B, L, D); updated in place."""
    steps: TokenTimesteps
    table: Tensor
    """(rows, D): a layer's shift, scale and gate lie one after another."""

    def normed(self, first: int, rotary: Rotary | None = None, *, scale_first: bool = False) -> Tokens:
        """Tokens normalised, scaled and shifted.

        Args:
            first: row of the layer's shift in the table, or of its scale where that comes first.
            rotary: rotary table of the tokens.
        """
        modulation = self.steps.modulation(self.table, slice(first, first + 2))

        def make(chunk: slice) -> Tensor:
            shift, scale = modulation(chunk)
            if scale_first:
                shift, scale = scale, shift
            return rms_norm(self.hidden[:, chunk]).mul_(1 + scale).add_(shift)

        return Tokens(make, self.hidden, rotary)

    def normed_fused(self, first: int) -> Tokens:
        """`normed` with the scaling rounded once, as core does in some places."""
        modulation = self.steps.modulation(self.table, slice(first, first + 2))

        def make(chunk: slice) -> Tensor:
            shift, scale = modulation(chunk)
            normed = rms_norm(self.hidden[:, chunk])
            return torch.addcmul(normed, normed, scale).add_(shift)

        return Tokens(make, self.hidden)

    def add_gated(self, row: int) -> Add:
        """An `Add` of a layer's output times the gate in a row of the table."""
        modulation = self.steps.modulation(self.table, slice(row, row + 1))

        def add(chunk: slice, made: Tensor) -> None:
            _add(self.hidden, chunk, made * modulation(chunk)[0])

        return add

    def add_gated_fused(self, row: int) -> Add:
        """`add_gated` with product and sum rounded once, as core does in some places."""
        modulation = self.steps.modulation(self.table, slice(row, row + 1))

        def add(chunk: slice, made: Tensor) -> None:
            self.hidden[:, chunk].addcmul_(made, modulation(chunk)[0])

        return add


def tokens_of(hidden: Tensor) -> Tokens:
    """Tokens as they are."""
    return Tokens(lambda chunk: hidden[:, chunk], hidden)


def normed_tokens(hidden: Tensor) -> Tokens:
    """Tokens normalised."""
    return Tokens(lambda chunk: rms_norm(hidden[:, chunk]), hidden)


def adding_to(hidden: Tensor) -> Add:
    """An `Add` of a layer's output."""
    return lambda chunk, made: _add(hidden, chunk, made)


def _add(hidden: Tensor, chunk: slice, made: Tensor) -> None:
    """Adds to some tokens of the hidden state, in place."""
    hidden[:, chunk].add_(made)
