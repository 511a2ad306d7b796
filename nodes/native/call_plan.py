"""Choosing how finely a model's calls are cut: as little as the budget, and the weights beside them, allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...i2v_core.memory.device import DeviceFacts
from ...i2v_core.planning import margin
from ...i2v_core.planning.plan import Stage, StagePrediction
from ...i2v_core.units import MIB, format_gib

_LEAST_WORKSPACE_BYTES = 8 * MIB
_WORKSPACE_SHARE = 1 / 8
"""Share of the finest cut's peak: a workspace adds about itself to that, and a larger one saves few launches."""

Peak = Callable[[int | None], int]
"""The traced peak of a call, of the workspace that its layers may take (None: unchunked)."""

UNKNOWN_DEVICE = DeviceFacts(device="cpu", name="cpu", precisions=())


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
    device: DeviceFacts = UNKNOWN_DEVICE
    """The device, with what earlier runs took of their predictions."""

    @property
    def expected_bytes(self) -> int:
        """The peak, corrected by earlier runs."""
        return margin.expected_bytes(_prediction(self.peak_bytes), self.device)

    @property
    def uncertainty_bytes(self) -> int:
        """The possible error of `expected_bytes`."""
        return margin.uncertainty_bytes(_prediction(self.peak_bytes), self.device)

    @property
    def needed_bytes(self) -> int:
        """The expected peak with its margin."""
        return margin.needed_bytes(_prediction(self.peak_bytes), self.device)

    @property
    def resident_bytes(self) -> int:
        """Weights that stay on the device during a call."""
        return max(0, min(self.weights_bytes, self.usable_bytes - self.needed_bytes))

    @property
    def holds_all_weights(self) -> bool:
        return self.resident_bytes >= self.weights_bytes

    def __str__(self) -> str:
        how = (
            "unchunked" if self.workspace_bytes is None else f"in chunks of {format_gib(self.workspace_bytes)} a layer"
        )
        return (
            f"a call needs {format_gib(self.needed_bytes)} beside the weights ({how}), core's own "
            f"{format_gib(self.stock_bytes)}; {format_gib(self.resident_bytes)} of {format_gib(self.weights_bytes)} of "
            f"weights can stay in {format_gib(self.usable_bytes)}"
        )


def _prediction(peak_bytes: int) -> StagePrediction:
    return StagePrediction(stage=Stage.SAMPLE, weights_bytes=0, activation_bytes=peak_bytes)


def plan_call(
    peak: Peak,
    *,
    usable_bytes: int,
    weights_bytes: int,
    held_bytes: int,
    device: DeviceFacts = UNKNOWN_DEVICE,
) -> CallPlan | None:
    """The coarsest cut with which all weights fit beside the call; else one beyond which finer saves little; None if
    nothing fits.

    Args:
        peak: the traced peak of a call; it must not rise as the workspace shrinks.
        held_bytes: weights of the largest layer call, which must be on the device in any case.
    """
    stock = CallPlan(
        workspace_bytes=None,
        peak_bytes=peak(None),
        stock_bytes=peak(None),
        usable_bytes=usable_bytes,
        weights_bytes=weights_bytes,
        device=device,
    )
    workspaces = _workspaces(stock.stock_bytes)
    if stock.holds_all_weights or not workspaces:
        return stock if stock.needed_bytes + held_bytes <= usable_bytes else None

    def cut(index: int) -> CallPlan:
        return replace(stock, workspace_bytes=workspaces[index], peak_bytes=peak(workspaces[index]))

    def fits(plan: CallPlan) -> bool:
        return plan.needed_bytes + held_bytes <= usable_bytes

    finest = cut(len(workspaces) - 1)
    if not fits(finest):
        return None
    if finest.holds_all_weights:
        spare_bytes = usable_bytes - weights_bytes - finest.needed_bytes
        return _coarsest(cut, lambda plan: plan.holds_all_weights, _index(workspaces, spare_bytes))
    # Each byte of a workspace takes the place of a weight's: no more of them than pays.
    enough = _index(workspaces, int(_WORKSPACE_SHARE * finest.peak_bytes))
    return _coarsest(cut, fits, enough, no_coarser=enough)


def _coarsest(
    cut: Callable[[int], CallPlan], good: Callable[[CallPlan], bool], guess: int, no_coarser: int = 0
) -> CallPlan:
    """The cut of the lowest index that is good, where all of higher ones are; found from a guess, since each costs a
    trace.
    """
    index = guess
    if not good(cut(index)):
        while not good(cut(index)):
            index += 1
        return cut(index)
    while index > no_coarser and good(cut(index - 1)):
        index -= 1
    return cut(index)


def finest_peak_bytes(peak: Peak) -> int:
    """The traced peak of the finest cut."""
    workspaces = _workspaces(peak(None))
    return peak(workspaces[-1] if workspaces else None)


def lowest_needed_bytes(peak: Peak, device: DeviceFacts = UNKNOWN_DEVICE) -> int:
    """Bytes that the finest cut needs, with its margin."""
    return margin.needed_bytes(_prediction(finest_peak_bytes(peak)), device)


def finer(plan: CallPlan, peak: Peak) -> CallPlan | None:
    """The next cut that takes less, after a call ran out of memory; None where there is none."""
    for workspace_bytes in _workspaces(plan.stock_bytes):
        if plan.workspace_bytes is None or workspace_bytes < plan.workspace_bytes:
            return replace(plan, workspace_bytes=workspace_bytes, peak_bytes=peak(workspace_bytes))
    return None


def _index(workspaces: Sequence[int], most_bytes: int) -> int:
    """Index of the largest workspace of at most so many bytes; of the smallest where none is."""
    return next((index for index, it in enumerate(workspaces) if it <= most_bytes), len(workspaces) - 1)


def _workspaces(stock_bytes: int) -> Sequence[int]:
    """Halves of the unchunked peak, down to where smaller chunks save nothing."""
    sizes: list[int] = []
    size = stock_bytes // 2
    while size >= min(_LEAST_WORKSPACE_BYTES, stock_bytes // 64 + 1):
        sizes.append(size)
        size //= 2
    return sizes
