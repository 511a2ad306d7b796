"""Finds memory that a batch does not release: what is held between jobs grows from each job to the next.

The memory that a job works with comes and goes; what it leaks stays. So the lowest level between the ends of two jobs
counts, the baseline, and whether baselines grow.

N baselines, K kinds of jobs.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from ...units import MIB

HOST = "host"

_WINDOW, _MIN_BASELINES = 60, 20
"""The newest baselines that are looked at, and the fewest that tell anything."""
_WARM_UP_JOBS = 2
"""Of each kind; libraries, caches and blocks of the allocator come with the first."""
_MIN_GROWTH_BYTES = MIB // 2
"""A job: less does no harm overnight, and caches that fill up grow as slowly."""
_MIN_EXPLAINED = 0.9
"""Share of the variance that a straight line explains. A single step reaches about 3/4, noise next to nothing."""
_MIN_BASELINES_OF_KIND = 3
"""Two lie on a line whatever has happened between them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The lowest level before the end of a job at a place."""

    job: int
    """How many jobs ended there before."""
    kind: Hashable
    """Jobs of a kind need the same memory."""
    held_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTrend:
    """Memory held between jobs at a place (`HOST`, or a device's name)."""

    place: str
    baselines: tuple[Baseline, ...]
    growth_bytes: float
    """A job."""
    suspected: bool
    """Whether noise, steps and other kinds of jobs do not explain the growth."""

    @property
    def held_bytes(self) -> int:
        return self.baselines[-1].held_bytes


class LeakDetector:
    """Collects levels between jobs, and a baseline at the end of each job. Not thread-safe."""

    def __init__(self) -> None:
        self._lowest: dict[str, int] = {}
        self._baselines: dict[str, deque[Baseline]] = {}
        self._jobs: Counter[str] = Counter()
        self._jobs_of_kind: Counter[tuple[str, Hashable]] = Counter()

    def read(self, levels: Mapping[str, int]) -> None:
        """Note the bytes that are held now, by place."""
        for place, held_bytes in levels.items():
            self._lowest[place] = min(held_bytes, self._lowest.get(place, held_bytes))

    def finished(self, device: str, kind: Hashable) -> None:
        """Note that a job of a device is done, which gives a baseline of the device and of the host."""
        for place in (HOST, device):
            if place not in self._lowest:
                continue
            baseline = Baseline(job=self._jobs[place], kind=kind, held_bytes=self._lowest.pop(place))
            self._jobs[place] += 1
            self._jobs_of_kind[place, kind] += 1
            if self._jobs_of_kind[place, kind] > _WARM_UP_JOBS:
                self._baselines.setdefault(place, deque(maxlen=_WINDOW)).append(baseline)

    def trends(self) -> tuple[MemoryTrend, ...]:
        return tuple(memory_trend(place, tuple(baselines)) for place, baselines in self._baselines.items())


def memory_trend(place: str, baselines: tuple[Baseline, ...]) -> MemoryTrend:
    """Judge at least one baseline: a leak is suspected if they lie on a rising line, as a whole and in either half.

    A step is in one half only, and what fills up and is freed again does not rise as a whole.
    """
    middle = len(baselines) // 2
    growth_bytes, is_line = _growth(baselines)
    suspected = (
        len(baselines) >= _MIN_BASELINES
        and is_line
        and all(_growth(half)[1] for half in (baselines[:middle], baselines[middle:]))
    )
    return MemoryTrend(place=place, baselines=baselines, growth_bytes=growth_bytes, suspected=suspected)


def _growth(baselines: Sequence[Baseline]) -> tuple[float, bool]:
    """Growth in bytes a job, and whether baselines lie on a rising line.

    Least squares, after each kind's own mean is taken away: a list from small jobs to large is no leak.
    """
    counts = Counter(it.kind for it in baselines)
    kinds = {kind: index for index, kind in enumerate(it for it in counts if counts[it] >= _MIN_BASELINES_OF_KIND)}
    compared = [it for it in baselines if it.kind in kinds]
    if not compared:
        return 0.0, False
    kind_N = np.array([kinds[it.kind] for it in compared])
    jobs_N = _without_mean(np.array([it.job for it in compared], dtype=np.float64), kind_N)
    # Relative to the first, in whole numbers: the level itself then changes not even the last digit of the slope.
    first_bytes = compared[0].held_bytes
    held_N = _without_mean(np.array([it.held_bytes - first_bytes for it in compared], dtype=np.float64), kind_N)
    covariance = float(jobs_N @ held_N)
    growth_bytes = covariance / float(jobs_N @ jobs_N)
    is_line = growth_bytes * covariance > _MIN_EXPLAINED * float(held_N @ held_N)
    return growth_bytes, is_line and growth_bytes > _MIN_GROWTH_BYTES


def _without_mean(values_N: np.ndarray, kind_N: np.ndarray) -> np.ndarray:
    """Values less the mean of their kind."""
    means_K = np.bincount(kind_N, values_N) / np.bincount(kind_N)
    return values_N - means_K[kind_N]


def held_now() -> dict[str, int]:
    """Bytes that this process holds of host memory, and its tensors of each card; unused cards are left out."""
    held = {HOST: int(psutil.Process(os.getpid()).memory_info().rss)}
    if torch.cuda.is_initialized():
        held |= {f"cuda:{index}": torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count())}
    return held
