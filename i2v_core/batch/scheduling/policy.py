"""The order of waiting jobs: by weight, or first come, first served. No other module decides it.

The weight of a job is its predicted seconds ÷ its predicted VRAM in GiB × its priority; the largest comes first. A
score doubles with every `AGEING_SECONDS` of waiting. So no job starves: one with w times the weight overtakes only
those that have waited less than `AGEING_SECONDS` · log2 w longer. And since all scores grow alike, the order of two
jobs never changes while they wait: it can be kept in a heap.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from ...units import GIB

AGEING_SECONDS = 1800.0
LOADED_FACTOR = 1.25
"""Bonus of jobs with the plan that ran last, whose traces, kernels and memory blocks are there."""

_MIN_SECONDS, _MIN_BYTES = 1e-3, 1 << 20

SortKey = tuple[float, float, float, int]
"""Ascending: the place that a user has given, the policy's number, the time when it was added, its id."""


class Policy(str, Enum):
    WEIGHT = "weight"
    FIRST_COME = "first-come"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceEstimate:
    """Predicted seconds of a whole job on a kind of device, and bytes at its peak."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingJob:
    """A waiting job."""

    id: int
    added_at: float
    plan: str
    """Key of its plan, the same for jobs that run alike."""
    on: Mapping[str, ResourceEstimate]
    """Estimates by kind of device; a kind that it does not fit is left out."""
    priority: float = 1.0
    position: int | None = None
    """Place that a user has given it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreBreakdown:
    """The numbers that give a job its place."""

    policy: Policy
    estimate: ResourceEstimate
    priority: float
    waited_seconds: float
    weight: float
    ageing: float
    """Factor for the time that it has waited."""
    loaded: float
    """Factor for the plan that ran last: `LOADED_FACTOR` or 1."""
    position: int | None

    @property
    def score(self) -> float:
        return self.weight * self.ageing * self.loaded


def weight(estimate: ResourceEstimate, priority: float) -> float:
    """Seconds ÷ GiB × priority, above 0."""
    return max(estimate.seconds, _MIN_SECONDS) / (max(estimate.peak_bytes, _MIN_BYTES) / GIB) * priority


def explain(policy: Policy, job: PendingJob, kind: str, now: float, loaded_plan: str | None = None) -> ScoreBreakdown:
    """Break down the score of a job on a kind of device that it fits."""
    estimate, waited_seconds = job.on[kind], max(0.0, now - job.added_at)
    return ScoreBreakdown(
        policy=policy,
        estimate=estimate,
        priority=job.priority,
        waited_seconds=waited_seconds,
        weight=weight(estimate, job.priority),
        ageing=2 ** min(waited_seconds / AGEING_SECONDS, 1000),
        loaded=LOADED_FACTOR if job.plan == loaded_plan else 1.0,
        position=job.position,
    )


def sort_key(policy: Policy, job: PendingJob, kind: str, loaded_plan: str | None = None) -> SortKey:
    """Key by which jobs are sorted on a kind of device where `loaded_plan` ran last; time does not change it."""
    position = math.inf if job.position is None else job.position
    return (position, _NUMBERS[policy](job, kind, loaded_plan), job.added_at, job.id)


def _by_weight(job: PendingJob, kind: str, loaded_plan: str | None) -> float:
    """The negated logarithm of the score that the job would have had when the epoch began.

    A job without an estimate comes after all that have one.
    """
    if kind not in job.on:
        return math.inf
    bonus = math.log2(LOADED_FACTOR) if job.plan == loaded_plan else 0.0
    return job.added_at / AGEING_SECONDS - math.log2(weight(job.on[kind], job.priority)) - bonus


_NUMBERS: Mapping[Policy, Callable[[PendingJob, str, str | None], float]] = {
    Policy.WEIGHT: _by_weight,
    Policy.FIRST_COME: lambda job, _, __: job.added_at,
}


class PolicyQueue:
    """Waiting jobs of one device, which gives the next one in the policy's order.

    Engines take jobs from it, and `run_order` lists them from it, so that neither can have another order.
    """

    def __init__(self, policy: Policy, kind: str) -> None:
        self._policy, self._kind = policy, kind
        self._jobs: dict[int, PendingJob] = {}
        self._keys: dict[int, SortKey] = {}
        # One heap for each plan, since the bonus of the loaded plan changes the order between plans but not within one.
        # Entries of removed jobs stay in it until they come up.
        self._heaps: dict[str, list[SortKey]] = {}

    @property
    def jobs(self) -> Iterable[PendingJob]:
        return self._jobs.values()

    def add(self, job: PendingJob) -> None:
        self._jobs[job.id] = job
        self._keys[job.id] = key = sort_key(self._policy, job, self._kind)
        heapq.heappush(self._heaps.setdefault(job.plan, []), key)

    def remove(self, job_id: int) -> None:
        del self._jobs[job_id], self._keys[job_id]

    def next(
        self, loaded_plan: str | None = None, fits: Callable[[PendingJob], bool] = lambda _: True
    ) -> PendingJob | None:
        """The first job in the policy's order, which stays in the queue; None where there is none that fits.

        Args:
            fits: asked about the first job of each plan.
        """
        firsts: list[SortKey] = []
        for plan, heap in list(self._heaps.items()):
            while heap and self._keys.get(_job_id(heap[0])) != heap[0]:
                heapq.heappop(heap)
            if not heap:
                del self._heaps[plan]
            elif plan == loaded_plan:
                firsts.append(sort_key(self._policy, self._jobs[_job_id(heap[0])], self._kind, loaded_plan))
            else:
                firsts.append(heap[0])
        heapq.heapify(firsts)
        while firsts:
            job = self._jobs[_job_id(heapq.heappop(firsts))]
            if fits(job):
                return job
        return None


def _job_id(key: SortKey) -> int:
    return key[-1]


def run_order(
    jobs: Iterable[PendingJob], policy: Policy, kind: str, loaded_plan: str | None = None
) -> Iterator[tuple[PendingJob, str | None]]:
    """Yield jobs in the order in which one device takes them, each with the plan that will have run before it."""
    queue = PolicyQueue(policy, kind)
    for job in jobs:
        queue.add(job)
    while (job := queue.next(loaded_plan)) is not None:
        queue.remove(job.id)
        yield job, loaded_plan
        loaded_plan = job.plan
