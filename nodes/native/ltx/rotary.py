"""Rotary tables of core's LTX models, made when they are needed and for the tokens that need them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeAlias

from torch import Tensor

RotaryTable: TypeAlias = tuple[Any, ...]
"""Core's table: a matrix (B, L, ...), or cosines and sines (B, L, D) or (B, heads, L, d); and whether halves rotate."""


class TableOnDemand:
    """A rotary table of which only the tokens' positions are kept.

    Args:
        compute: core's own function from positions to a table.
        positions: (B, axes, L, ...) of the tokens.
    """

    def __init__(self, compute: Callable[[Tensor], RotaryTable], positions: Tensor) -> None:
        self._compute = compute
        self._positions = positions.clone()  # core goes on to scale its own in place

    @property
    def table_bytes(self) -> int:
        """Size of the whole table."""
        row = self.rows(slice(0, 1))
        return self._positions.shape[2] * sum(it.nbytes for it in row if isinstance(it, Tensor))

    def rows(self, tokens: slice) -> RotaryTable:
        """The table of some tokens."""
        return self._compute(self._positions[:, :, tokens])

    def whole(self) -> RotaryTable:
        """The table of all tokens, as core makes it."""
        return self._compute(self._positions)


Rotary: TypeAlias = RotaryTable | TableOnDemand


def rows_of(rotary: Rotary, tokens: slice) -> RotaryTable:
    """The table of some tokens."""
    if isinstance(rotary, TableOnDemand):
        return rotary.rows(tokens)
    *parts, halves = rotary
    tokens_after_heads = halves and len(parts) == 2
    return (*(part[:, :, tokens] if tokens_after_heads else part[:, tokens] for part in parts), halves)


def whole_table(rotary: Rotary) -> RotaryTable:
    """The table of all tokens, as core makes it."""
    return rotary.whole() if isinstance(rotary, TableOnDemand) else rotary


def on_demand(model: Any, positions: Any, *args: Any) -> Any:
    """The result of core's `_prepare_positional_embeddings`, with `TableOnDemand`s for its tables."""
    frequencies = copy.copy(model)
    # Core makes the frequencies on the CPU for some models: once a call, not for each chunk.
    frequencies.freq_grid_generator = cache(partial(_frequencies, model))

    def table(positions: Tensor, **settings: Any) -> TableOnDemand:
        return TableOnDemand(partial(type(model)._precompute_freqs_cis, frequencies, **settings), positions)

    recorder = copy.copy(model)
    recorder._precompute_freqs_cis = table
    return type(model)._prepare_positional_embeddings(recorder, positions, *args)


def _frequencies(model: Any, theta: float, axes: int, dim: int, device: Any) -> Tensor:
    return model.freq_grid_generator(theta, axes, dim, device).to(device)
