"""Which job comes next: by weight, or first come, first served. Pure functions of what is known of the jobs.

The weight of a job is its predicted seconds ÷ its predicted VRAM in GiB × its priority; the largest comes first. A
score doubles with every `AGEING_SECONDS` of waiting. So no job starves: one with w times the weight overtakes only
those that have waited less than `AGEING_SECONDS` · log2 w longer. And since all scores grow alike, the order of two
jobs never changes while they wait: it can be kept in a heap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from ...units import GIB, format_gib
from ...words import Message, message

AGEING_SECONDS = 1800.0
LOADED_FACTOR = 1.25
"""For a job of the plan that ran last: its traces, kernels and blocks of memory are there."""

_LEAST_SECONDS, _LEAST_BYTES = 1e-3, 1 << 20

SortKey = tuple[float, float, float, int]
"""Ascending: the place that a user has given, the rule's number, when it was added, its id."""


class Policy(str, Enum):
    WEIGHT = "weight"
    FIRST_COME = "first-come"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceEstimate:
    """What a job is predicted to take on a kind of card: seconds in all, and bytes at its peak."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingJob:
    """A job that waits. `on` says what it takes on each kind of card that it fits; `plan` names jobs of one shape."""

    id: int
    added_at: float
    plan: str
    on: Mapping[str, ResourceEstimate]
    priority: float = 1.0
    position: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreBreakdown:
    """The numbers by which a job has its place."""

    rule: Policy
    taking: ResourceEstimate
    priority: float
    waited_seconds: float
    weight: float
    ageing: float
    loaded: float
    position: int | None

    @property
    def score(self) -> float:
        return self.weight * self.ageing * self.loaded

    @property
    def words(self) -> Message:
        waited = f"{self.waited_seconds:.0f}"
        if self.position is not None:
            return message("whyByHand", place=self.position + 1)
        if self.rule is Policy.FIRST_COME:
            return message("whyFirstCome", waited=waited)
        return message(
            "whyScoreLoaded" if self.loaded > 1 else "whyScore",
            score=f"{self.score:.3g}",
            weight=f"{self.weight:.3g}",
            seconds=f"{self.taking.seconds:.1f}",
            amount=format_gib(self.taking.peak_bytes),
            priority=f"{self.priority:g}",
            ageing=f"{self.ageing:.3g}",
            waited=waited,
            loaded=f"{self.loaded:g}",
        )

    def __str__(self) -> str:
        return str(self.words)


def weight(taking: ResourceEstimate, priority: float) -> float:
    """Seconds ÷ GiB × priority, above 0."""
    return max(taking.seconds, _LEAST_SECONDS) / (max(taking.peak_bytes, _LEAST_BYTES) / GIB) * priority


def explain(rule: Policy, job: PendingJob, kind: str, now: float, loaded_plan: str | None = None) -> ScoreBreakdown:
    """Why a job has its place on a kind of card at a time."""
    taking, waited_seconds = job.on[kind], max(0.0, now - job.added_at)
    return ScoreBreakdown(
        rule=rule,
        taking=taking,
        priority=job.priority,
        waited_seconds=waited_seconds,
        weight=weight(taking, job.priority),
        ageing=2 ** min(waited_seconds / AGEING_SECONDS, 1000),
        loaded=LOADED_FACTOR if job.plan == loaded_plan else 1.0,
        position=job.position,
    )


def sort_key(rule: Policy, job: PendingJob, kind: str) -> SortKey:
    """Jobs in ascending order of it come one after another, on a kind of card that they fit; it never changes."""
    position = math.inf if job.position is None else job.position
    return (position, _NUMBERS[rule](job, kind), job.added_at, job.id)


def with_preference(rule: Policy, key: SortKey, job: PendingJob, loaded_plan: str | None) -> SortKey:
    """The key of a job, on a card where the given plan ran last."""
    if rule is not Policy.WEIGHT or job.plan != loaded_plan:
        return key
    return (key[0], key[1] - math.log2(LOADED_FACTOR), *key[2:])


def _by_weight(job: PendingJob, kind: str) -> float:
    """The score's logarithm, as it was when the epoch began, negated."""
    return job.added_at / AGEING_SECONDS - math.log2(weight(job.on[kind], job.priority))


_NUMBERS: dict[Policy, Callable[[PendingJob, str], float]] = {
    Policy.WEIGHT: _by_weight,
    Policy.FIRST_COME: lambda job, _: job.added_at,
}
