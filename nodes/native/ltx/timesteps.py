"""Embedded time steps of tokens: one row for each distinct time step, and each token's place among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Modulation = Callable[[slice], tuple[Tensor, ...]]
"""Returns the shifts, scales and gates (B, 1 or n, D) of some tokens."""


@dataclass(frozen=True, slots=True)
class TokenTimesteps:
    """Embedded time steps of L tokens."""

    rows: Tensor
    """(B, S, width): one for all tokens, one for each token, or shared as the other fields say."""
    places: Tensor | None = None
    """(L,) row of each token."""
    tokens_per_row: int = 1
    """Tokens in a row that share one, where `places` is None."""

    @classmethod
    def of(cls, embedded: Any) -> TokenTimesteps:
        """Wraps embedded time steps of core's: a tensor, or its `CompressedTimestep`."""
        if isinstance(embedded, TokenTimesteps):
            return embedded
        if isinstance(embedded, Tensor):
            return cls(embedded)
        return cls(embedded.data, tokens_per_row=embedded.patches_per_frame)

    def modulation(self, table: Tensor, chosen: slice = slice(None)) -> Modulation:
        """Some of the rows of a block's table (rows, D), each with its part of the time step added."""
        batch, steps, width = self.rows.shape
        offsets = table[chosen].to(device=self.rows.device, dtype=self.rows.dtype)
        return self._added(offsets, self.rows.reshape(batch, steps, len(table), width // len(table))[:, :, chosen])

    def shared_modulation(self, table: Tensor) -> Modulation:
        """All rows of a table (rows, D), each with the same time step (B, S, D) added."""
        return self._added(table.to(device=self.rows.device, dtype=self.rows.dtype), self.rows[:, :, None])

    def _added(self, offsets: Tensor, steps: Tensor) -> Modulation:
        count = self.rows.shape[1]
        if count > 1 and self.places is None and self.tokens_per_row == 1:
            return lambda tokens: (offsets + steps[:, tokens]).unbind(2)
        sums = offsets + steps
        return lambda tokens: sums[:, self._rows_of(tokens)].unbind(2)

    def _rows_of(self, tokens: slice) -> Tensor | slice:
        if self.rows.shape[1] == 1:
            return slice(None)
        if self.places is not None:
            return self.places[tokens]
        return torch.arange(tokens.start, tokens.stop, device=self.rows.device) // self.tokens_per_row


def distinct(timesteps: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """The distinct ones (B, S) of the tokens' time steps (B, L, 1), and each token's place (L,) among them.

    Args:
        timesteps: of the tokens.
        count: S, in a trace, whose time steps have no values.
    """
    steps = timesteps.flatten(1)
    if count is not None:
        return steps.new_empty(len(steps), count), steps.new_empty(steps.shape[1], dtype=torch.long)
    values, places = steps.unique(dim=1, return_inverse=True)
    return values, places
