"""Choosing how an autoencoder runs: the fastest settings that fit beside its weights, core's own code first."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from ....i2v_core.units import format_gib
from .bands import CANDIDATES, Bands

_MARGIN_RATIO = 0.05
"""Allowance for what a trace of live tensors misses: the allocator's rounding, cuDNN's workspaces. Estimated without
a card (November 2026)."""

Peak: TypeAlias = Callable[[Bands | None], int]
"""The traced peak of a pass by its settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEPlan:
    """Settings of one pass, with what it takes beside the weights."""

    candidate: int
    """Index among `CANDIDATES`."""
    peak_bytes: int
    """Traced peak."""
    stock_bytes: int
    """Traced peak of core's own code."""
    usable_bytes: int
    """Device memory that weights and activations may take together."""
    weights_bytes: int

    @property
    def bands(self) -> Bands | None:
        return CANDIDATES[self.candidate]

    @property
    def needed_bytes(self) -> int:
        return with_margin(self.peak_bytes)

    def __str__(self) -> str:
        how = "in core's own code" if self.bands is None else f"in {self.bands}"
        return (
            f"needs {format_gib(self.needed_bytes)} beside {format_gib(self.weights_bytes)} of weights ({how}), core's "
            f"own {format_gib(self.stock_bytes)}; {format_gib(self.usable_bytes)} can be used"
        )


def with_margin(peak_bytes: int) -> int:
    return int(peak_bytes * (1 + _MARGIN_RATIO))


def plan_pass(peak: Peak, *, usable_bytes: int, weights_bytes: int, held_bytes: int) -> VAEPlan | None:
    """The fastest candidate that fits beside all weights; else the one of least memory; None if that does not fit.

    Args:
        peak: the traced peak; it must not rise from one candidate to the next.
        held_bytes: weights of the largest layer, which must be on the device in any case.
    """

    def fits(bands: Bands | None) -> bool:
        return with_margin(peak(bands)) + weights_bytes <= usable_bytes

    candidate = 0 if fits(None) else bisect_left(CANDIDATES, True, lo=1, key=fits)
    if candidate == len(CANDIDATES):
        candidate -= 1
        if lowest_needed_bytes(peak) + held_bytes > usable_bytes:
            return None
    return plan_of(candidate, peak, usable_bytes=usable_bytes, weights_bytes=weights_bytes)


def plan_of(candidate: int, peak: Peak, **known: Any) -> VAEPlan:
    """The plan with the settings of a candidate."""
    return VAEPlan(candidate=candidate, peak_bytes=peak(CANDIDATES[candidate]), stock_bytes=peak(None), **known)


def lowest_needed_bytes(peak: Peak) -> int:
    """Bytes of the candidate of least memory, with its margin."""
    return with_margin(peak(CANDIDATES[-1]))
