"""Telling core what a call needs, in core's own terms."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.sampler_helpers

_CORE_FACTOR = 1.5
"""Core wants this many times its own estimate free before it runs both guidance branches together."""


def estimating_shape(model: Any, noise_shape: Sequence[int], conds: Any, needed_bytes: int) -> list[int]:
    """A latent shape for which core's own estimate of one branch is `needed_bytes`.

    Core's estimate grows linearly with the latent's area and takes the shape for nothing else, so two estimates tell
    the area that is wanted.
    """
    batch, channels = noise_shape[:2]
    area = max(2, math.prod(noise_shape[2:]))

    def estimate(area: int) -> float:
        _, minimum = comfy.sampler_helpers.estimate_memory(model, [batch, channels, 1, 1, area], conds)
        return minimum

    whole, half = estimate(area), estimate(area // 2)
    slope = (whole - half) / (area - area // 2)
    if slope <= 0:
        return list(noise_shape)
    wanted = area + (needed_bytes - whole) / slope
    return [batch, channels, 1, 1, max(1, math.ceil(wanted))]


@contextmanager
def memory_required_as(model: Any, branch_bytes: int, *, branch_size: int, most_bytes: int) -> Generator[None]:
    """Core's estimate of a call replaced by what was traced, while the context lasts.

    Args:
        branch_bytes: what one guidance branch takes.
        branch_size: the batch of one branch.
        most_bytes: what calls may take at most; branches that take more together run one after another.
    """

    def memory_required(input_shape: Sequence[int], cond_shapes: Any = None) -> float:  # noqa: ARG001
        needed_bytes = branch_bytes * input_shape[0] / branch_size
        return needed_bytes / _CORE_FACTOR if needed_bytes <= most_bytes else math.inf

    before = model.__dict__.get("memory_required")  # of an outer context
    model.memory_required = memory_required
    try:
        yield
    finally:
        if before is None:
            del model.memory_required
        else:
            model.memory_required = before
