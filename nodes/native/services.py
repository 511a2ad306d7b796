"""What the host's side provides to a fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Services that the host's side provides to a fit."""

    usable_bytes: Callable[[], int]
    """Device memory that the model may take now: the budget, or what is free or can be freed."""
    check_cancelled: Callable[[], None]
    """Raises when the user has cancelled."""
    say: Callable[[str], None] = lambda _: None
    """Shows a line to the user."""
    check_latent: Callable[[Sequence[int]], None] = lambda _: None
    """Called before sampling with the latent's shape; raises where what follows could not run, such as the decode."""
