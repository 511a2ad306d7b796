"""Differences between results."""

from __future__ import annotations

from torch import Tensor


def relative_rms(result: Tensor, reference: Tensor) -> float:
    """Return the root mean square of the difference, relative to that of the reference."""
    difference = result.double() - reference.double()
    return (difference.square().mean() / reference.double().square().mean()).sqrt().item()
