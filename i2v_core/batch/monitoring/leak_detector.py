"""Memory that a batch does not give back: whether what is held between jobs grows from one job to the next.

What a job needs for itself comes and goes; what it leaves behind stays. So of all that is held from the end of one job
to the end of the next, the lowest level counts, and whether these levels grow.

F floors, P pairs of them.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch

from ...units import MIB

HOST = "host"

_WINDOW, _TELLING_JOBS = 60, 16
"""Jobs that are looked at, and the fewest of them that tell something."""
_WARMING_JOBS = 2
"""Of each kind, whose libraries, caches and blocks of the allocator come with the first."""
_LEAST_GROWTH_BYTES = 2 * MIB
_CERTAIN, _LIKELY = 3.0, 1.645
"""Standard deviations of the test of all, and of its newer half."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The lowest level before the end of a job, the `job`-th on its place; jobs of a `kind` take alike."""

    job: int
    kind: Hashable
    held_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTrend:
    """What is held between jobs at a place (`HOST`, or a device's name): the last floors, and their growth a job.

    `suspected` where that is more than what chance and a first filling of caches explain.
    """

    place: str
    floors: tuple[Baseline, ...]
    growth_bytes: float
    suspected: bool

    @property
    def held_bytes(self) -> int:
        return self.floors[-1].held_bytes


class LeakDetector:
    """Collects levels, and their floors as jobs end; for one thread at a time."""

    def __init__(self) -> None:
        self._lowest: dict[str, int] = {}
        self._floors: dict[str, deque[Baseline]] = {}
        self._jobs: Counter[str] = Counter()
        self._warm: Counter[tuple[str, Hashable]] = Counter()

    def read(self, levels: Mapping[str, int]) -> None:
        """What is held now, in bytes by place."""
        for place, held_bytes in levels.items():
            self._lowest[place] = min(held_bytes, self._lowest.get(place, held_bytes))

    def finished(self, device: str, kind: Hashable) -> None:
        """A job of a device is done: the floor of the device, and that of the host, are known."""
        for place in (HOST, device):
            if place not in self._lowest:
                continue
            floor = Baseline(job=self._jobs[place], kind=kind, held_bytes=self._lowest.pop(place))
            self._jobs[place] += 1
            self._warm[place, kind] += 1
            if self._warm[place, kind] > _WARMING_JOBS:
                self._floors.setdefault(place, deque(maxlen=_WINDOW)).append(floor)

    def trends(self) -> tuple[MemoryTrend, ...]:
        return tuple(trend(place, tuple(floors)) for place, floors in self._floors.items())


def trend(place: str, floors: tuple[Baseline, ...]) -> MemoryTrend:
    """Of at least one floor. A step, or what fills up, is no leak: the newer half must grow too, at half the pace at
    least.
    """
    newer = floors[len(floors) // 2 :]
    (growth_bytes, certainty), (newer_bytes, newer_certainty) = _growth(floors), _growth(newer)
    suspected = (
        len(floors) >= _TELLING_JOBS
        and growth_bytes > _LEAST_GROWTH_BYTES
        and newer_bytes > growth_bytes / 2
        and certainty > _CERTAIN
        and newer_certainty > _LIKELY
    )
    return MemoryTrend(place=place, floors=floors, growth_bytes=growth_bytes, suspected=suspected)


def _growth(floors: Sequence[Baseline]) -> tuple[float, float]:
    """Bytes a job, and by how many standard deviations there are more pairs that grow than chance would have.

    Only floors of one kind are compared, so that a list from small jobs to large is no leak: the seasonal Kendall slope
    and test (Hirsch, Slack and Smith 1982), with kinds for seasons. The slope is the median of the pairs' (Theil-Sen),
    which neither outliers nor noise move far. Ties make the test say less than it could.
    """
    slopes: list[Any] = [np.empty(0)]
    variance = 0.0
    by_kind: dict[Hashable, list[Baseline]] = {}
    for floor in floors:
        by_kind.setdefault(floor.kind, []).append(floor)
    for alike in by_kind.values():
        count = len(alike)
        jobs_F = np.array([it.job for it in alike], dtype=np.float64)
        held_F = np.array([it.held_bytes for it in alike], dtype=np.float64)
        earlier_P, later_P = np.triu_indices(count, k=1)
        slopes.append((held_F[later_P] - held_F[earlier_P]) / (jobs_F[later_P] - jobs_F[earlier_P]))
        variance += count * (count - 1) * (2 * count + 5) / 18
    slopes_P = np.concatenate(slopes)
    if not variance:
        return 0.0, 0.0
    score = float(np.sign(slopes_P).sum())
    return float(np.median(slopes_P)), float((score - np.sign(score)) / np.sqrt(variance))


def held_now() -> dict[str, int]:
    """Bytes that this process holds of host memory, and its tensors of each card; a card not used yet is left out."""
    held = {HOST: int(psutil.Process(os.getpid()).memory_info().rss)}
    if torch.cuda.is_initialized():
        held |= {f"cuda:{index}": torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count())}
    return held
