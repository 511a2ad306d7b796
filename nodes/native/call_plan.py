"""Choosing how finely a model's calls are cut: as little as the budget, and the weights beside them, allow."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...i2v_core.units import MIB, format_gib

_MARGIN_RATIO = 0.03
"""Allowance for what a trace of live tensors misses: the allocator's rounding, kernels' workspaces. Estimated
without a card (November 2026)."""
_LEAST_WORKSPACE_BYTES = 8 * MIB
_KNEE_RATIO = 0.92
"""Half the workspace that does not lower the peak below this share of it saves little and costs launches."""

Peak = Callable[[int | None], int]
"""The traced peak of a call, of the workspace that its layers may take (None: unchunked)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPlan:
    """Settings of a model's calls, with what one guidance branch takes beside the weights."""

    workspace_bytes: int | None
    """Temporary memory of one layer; None: layers run unchunked."""
    peak_bytes: int
    """Traced peak of the activations of a call."""
    stock_bytes: int
    """Traced peak of core's own call."""
    usable_bytes: int
    """Device memory that weights and activations may take together."""
    weights_bytes: int
    """The model's weights, should all of them be on the device."""

    @property
    def needed_bytes(self) -> int:
        """The peak with its margin."""
        return int(self.peak_bytes * (1 + _MARGIN_RATIO))

    @property
    def resident_bytes(self) -> int:
        """Weights that stay on the device during a call."""
        return max(0, min(self.weights_bytes, self.usable_bytes - self.needed_bytes))

    def __str__(self) -> str:
        how = (
            "unchunked" if self.workspace_bytes is None else f"in chunks of {format_gib(self.workspace_bytes)} a layer"
        )
        return (
            f"a call needs {format_gib(self.needed_bytes)} beside the weights ({how}), core's own "
            f"{format_gib(self.stock_bytes)}; {format_gib(self.resident_bytes)} of {format_gib(self.weights_bytes)} of "
            f"weights can stay in {format_gib(self.usable_bytes)}"
        )


def plan_call(peak: Peak, *, usable_bytes: int, weights_bytes: int, held_bytes: int) -> CallPlan | None:
    """The coarsest cut with which all weights fit beside the call; else the knee of the curve; None if nothing fits.

    Args:
        peak: the traced peak of a call; it must not rise as the workspace shrinks.
        held_bytes: weights of the largest layer call, which must be on the device in any case.
    """
    stock_bytes = peak(None)

    def planned(workspace_bytes: int | None, peak_bytes: int) -> CallPlan:
        return CallPlan(
            workspace_bytes=workspace_bytes,
            peak_bytes=peak_bytes,
            stock_bytes=stock_bytes,
            usable_bytes=usable_bytes,
            weights_bytes=weights_bytes,
        )

    candidates = (None, *_workspaces(stock_bytes))

    def at(index: int) -> CallPlan:
        return planned(candidates[index], peak(candidates[index]))

    finest = at(len(candidates) - 1)
    if finest.needed_bytes + held_bytes > usable_bytes:
        return None
    if finest.resident_bytes >= weights_bytes:
        index = bisect_left(candidates, True, key=lambda it: planned(it, peak(it)).resident_bytes >= weights_bytes)
        return at(index)
    for index in range(len(candidates) - 1, 0, -1):
        coarser, plan = at(index - 1), at(index)
        if plan.peak_bytes <= coarser.peak_bytes * _KNEE_RATIO or coarser.needed_bytes + held_bytes > usable_bytes:
            return plan
    return at(0)


def finest_peak_bytes(peak: Peak) -> int:
    """The traced peak of the finest cut."""
    workspaces = _workspaces(peak(None))
    return peak(workspaces[-1] if workspaces else None)


def lowest_needed_bytes(peak: Peak) -> int:
    """Bytes that the finest cut needs, with its margin."""
    return int(finest_peak_bytes(peak) * (1 + _MARGIN_RATIO))


def finer(plan: CallPlan, peak: Peak) -> CallPlan | None:
    """The next cut that takes less, after a call ran out of memory; None where there is none."""
    for workspace_bytes in _workspaces(plan.stock_bytes):
        if plan.workspace_bytes is not None and workspace_bytes >= plan.workspace_bytes:
            continue
        return CallPlan(
            workspace_bytes=workspace_bytes,
            peak_bytes=peak(workspace_bytes),
            stock_bytes=plan.stock_bytes,
            usable_bytes=plan.usable_bytes,
            weights_bytes=plan.weights_bytes,
        )
    return None


def _workspaces(stock_bytes: int) -> Sequence[int]:
    """Halves of the unchunked peak, down to where smaller chunks save nothing."""
    sizes: list[int] = []
    size = stock_bytes // 2
    while size >= min(_LEAST_WORKSPACE_BYTES, stock_bytes // 64 + 1):
        sizes.append(size)
        size //= 2
    return sizes
