"""Sampling settings that need less memory and change the result a little, in the order in which they are tried."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from ..families import family_of
from ..placement.storage import WeightStorage
from ..sampling.context import ContextWindows
from .plan import SampleSettings
from .request import Request

# Lengths that are tried beside halves of the clip, and the shortest that still shows a movement.
_LENGTHS, _SHORTEST = (16, 8), 8
_OVERLAP = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Approximation:
    """The two settings of sampling that change its result. With the defaults the result is exact."""

    weight_storage: WeightStorage = WeightStorage.AS_COMPUTED
    context: ContextWindows | None = None

    @classmethod
    def of(cls, settings: SampleSettings) -> Approximation:
        return cls(weight_storage=settings.weight_storage, context=settings.context)

    def applied_to(self, settings: SampleSettings) -> SampleSettings:
        return replace(settings, weight_storage=self.weight_storage, context=self.context)

    def __str__(self) -> str:
        """Name it, such as `int8 weights`; empty where the result is exact."""
        parts: list[str] = []
        if self.weight_storage is not WeightStorage.AS_COMPUTED:
            parts.append(f"{self.weight_storage.value} weights")
        if self.context is not None:
            parts.append(f"context windows of {self.context.context_length} frames")
        return ", ".join(parts)


EXACT = Approximation()


def approximations(request: Request) -> tuple[Approximation, ...]:
    """Approximations that a request allows, the one that changes the result least first: the exact one.

    Weights in int8 change it less than in fp8 (docs/memory-model.md has the figures), but need torchao; context windows
    change it more than either, and shorter windows more than longer ones.
    """
    if not request.allow_approximate:
        return (EXACT,)
    contexts = (None, *_contexts(request))
    return tuple(
        Approximation(weight_storage=it, context=context) for context, it in product(contexts, _storages(request))
    )


def lowest_memory_approximations(request: Request) -> tuple[Approximation, ...]:
    """Approximations that may need the least memory: the shortest windows, with weights in any format."""
    if not request.allow_approximate:
        return (EXACT,)
    context = (None, *_contexts(request))[-1]
    return tuple(Approximation(weight_storage=storage, context=context) for storage in _storages(request))


def _storages(request: Request) -> list[WeightStorage]:
    """Formats for the weights. Those of a quantised file have 8 bits at most already."""
    if request.architecture.stored:
        return [WeightStorage.AS_COMPUTED]
    return [storage for storage in WeightStorage if storage.available]


def _contexts(request: Request) -> list[ContextWindows]:
    """Windows from long to short; none where the denoiser must see the whole clip."""
    facts = family_of(request.architecture).facts
    frames = facts.latent_size(request.size).latent_frames
    if facts.anchor_frames is None:
        return []
    halves: list[int] = []
    length = frames // 2
    while length >= _SHORTEST:
        halves.append(length)
        length //= 2
    lengths = {length for length in (*halves, *_LENGTHS) if length < frames}
    return [
        ContextWindows(context_length=length, context_overlap=int(length * _OVERLAP))
        for length in sorted(lengths, reverse=True)
    ]
