"""Telling core what calls need, in core's own terms."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_CORE_FACTOR = 1.5
"""Core wants this many times its own estimate free before it runs guidance branches together."""


@dataclass(frozen=True, slots=True)
class CallNeeds:
    """Memory that calls need, by the shape of the latents of all their branches."""

    needed_bytes: Mapping[tuple[int, ...], int]

    def of(self, input_shape: Sequence[int]) -> int | None:
        """Bytes that a call needs; None where none of this shape is expected."""
        return self.needed_bytes.get(tuple(input_shape))

    @property
    def largest_branch(self) -> int:
        """Bytes that the largest of single branches needs, which are the calls of the smallest batch."""
        fewest = min(shape[0] for shape in self.needed_bytes)
        return max(needed for shape, needed in self.needed_bytes.items() if shape[0] == fewest)

    def scaled(self, input_shape: Sequence[int]) -> int:
        """Bytes that a call of another shape needs, in proportion to the nearest that is known."""
        size = math.prod(input_shape)
        shape = min(self.needed_bytes, key=lambda it: abs(math.log(math.prod(it) / size)))
        return math.ceil(self.needed_bytes[shape] * size / math.prod(shape))


@contextmanager
def loading_for(model: Any, needs: CallNeeds) -> Generator[None]:
    """Core's estimates of a run replaced by what its calls need, while the context lasts, in which core loads models.

    Core asks for one branch, which must be free, and for two, for which it unloads other models. Branches that cannot
    run together need what one does.
    """

    def memory_required(input_shape: Sequence[int], cond_shapes: Any = None) -> float:  # noqa: ARG001
        needed_bytes = needs.of(input_shape)
        return needs.largest_branch if needed_bytes is None else needed_bytes

    with _replaced(model, memory_required):
        yield


@contextmanager
def batching_for(model: Any, needs: CallNeeds, *, most_bytes: int) -> Generator[None]:
    """Core's estimates of calls replaced by what they need, while the context lasts, in which core joins branches.

    Args:
        most_bytes: what a call may take at most; branches that take more together run one after another.
    """

    def memory_required(input_shape: Sequence[int], cond_shapes: Any = None) -> float:  # noqa: ARG001
        needed_bytes = needs.of(input_shape) or needs.scaled(input_shape)
        return needed_bytes / _CORE_FACTOR if needed_bytes <= most_bytes else math.inf

    with _replaced(model, memory_required):
        yield


@contextmanager
def _replaced(model: Any, memory_required: Any) -> Generator[None]:
    before = model.__dict__.get("memory_required")
    model.memory_required = memory_required
    try:
        yield
    finally:
        del model.memory_required
        if before is not None:
            model.memory_required = before
