"""The modulation of Wan's layers by the time step, for some tokens at a time.

Shape legend: B batch, L tokens, n tokens of a chunk, D width, S time steps of a call (1, or one for each latent frame).
"""

from __future__ import annotations

import comfy.model_management as management
import torch
from torch import Tensor, nn


def modulation(own: Tensor, e: Tensor, like: Tensor, rows: int = 6) -> tuple[Tensor, ...]:
    """The modulation's rows (B, S, D) as core makes them of a call's time embedding."""
    own = management.cast_to(own, dtype=like.dtype, device=like.device)
    if rows == 2:  # the head gets the embedding without rows
        joined = own + e.unsqueeze(1) if e.ndim < 3 else own.unsqueeze(0) + e.unsqueeze(2)
        return joined.chunk(2, dim=1) if e.ndim < 3 else joined.unbind(2)
    return (own + e).chunk(rows, dim=1) if e.ndim < 4 else (own.unsqueeze(0) + e).unbind(2)


def rows_of(modulation_BSD: Tensor, tokens: slice, total: int) -> Tensor:
    """A row of the modulation for some tokens, as `repeat_e` of core makes it for all of them."""
    steps = modulation_BSD.shape[1]
    repeats = total // steps if steps > 1 else 1
    if repeats == 1:
        return modulation_BSD if steps == 1 else modulation_BSD[:, tokens]
    if repeats * steps != total:
        repeats += 1
    step_of_token = torch.arange(tokens.start, tokens.stop, device=modulation_BSD.device) // repeats
    return modulation_BSD.index_select(1, step_of_token)


def modulated(hidden: Tensor, norm: nn.Module, shift: Tensor, scale: Tensor, tokens: slice) -> Tensor:
    """Some tokens (B, n, D), normalised, scaled and shifted."""
    total = hidden.shape[1]
    return torch.addcmul(rows_of(shift, tokens, total), norm(hidden[:, tokens]), 1 + rows_of(scale, tokens, total))
