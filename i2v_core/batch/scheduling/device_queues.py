"""Jobs onto several cards, so that the one that ends last ends as early as it can.

Longest processing time first (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969): the longest job goes to the
card that would be done with it first, of those that it fits. Each card takes its share in the order of the rule; one
that has none left takes over from the card with the most to do. So the shares follow what jobs really take.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping

from .policy import PendingJob, Policy, SortKey, sort_key, with_preference

_Heap = list[tuple[SortKey, int]]


class DeviceQueues:
    """Which card is to run which of the waiting jobs. `kinds` gives each card's kind, by name. Not for many threads.

    Times are in seconds, by any clock.
    """

    def __init__(self, kinds: Mapping[str, str], rule: Policy = Policy.WEIGHT) -> None:
        self._kinds = dict(kinds)
        self._rule = rule
        self._jobs: dict[int, PendingJob] = {}
        self._card_of: dict[int, str] = {}
        self._waiting_seconds = dict.fromkeys(kinds, 0.0)
        self._busy_until = dict.fromkeys(kinds, 0.0)
        # By card and plan; jobs that have gone elsewhere stay in them until they come up.
        self._heaps: dict[str, dict[str, _Heap]] = {card: {} for card in kinds}

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: int) -> bool:
        return job_id in self._jobs

    def add(self, jobs: Iterable[PendingJob], now: float = 0.0) -> list[PendingJob]:
        """Gives each job to a card; those that fit none are returned."""
        homeless: list[PendingJob] = []
        for job in sorted(jobs, key=self._longest_first):
            card = min(
                (card for card, kind in self._kinds.items() if kind in job.on),
                key=lambda card: self.load_seconds(card, now) + job.on[self._kinds[card]].seconds,
                default=None,
            )
            if card is None:
                homeless.append(job)
            else:
                self._give(job, card)
        return homeless

    def remove(self, job_id: int) -> None:
        job, card = self._jobs.pop(job_id), self._card_of.pop(job_id)
        self._waiting_seconds[card] -= job.on[self._kinds[card]].seconds

    def take(
        self,
        card: str,
        now: float = 0.0,
        loaded_plan: str | None = None,
        fits: Callable[[PendingJob], bool] = lambda _: True,
    ) -> PendingJob | None:
        """The job that the card is to run next, which is then out of the shares; None where there is none for it.

        Args:
            now: from then on the card counts as busy for the job's predicted seconds.
            loaded_plan: of the job that the card ran last.
            fits: whether a job fits what is free on the card now; asked once of each plan.
        """
        job = self._next_of(card, loaded_plan, fits) or self._from_others(card, now, fits)
        if job is None:
            return None
        self.remove(job.id)
        self._busy_until[card] = max(now, self._busy_until[card]) + job.on[self._kinds[card]].seconds
        return job

    def is_idle(self, card: str, now: float) -> None:
        """The card has nothing more to do, whatever was predicted."""
        self._busy_until[card] = now

    def lose(self, card: str, now: float = 0.0) -> list[PendingJob]:
        """The card is gone, and its jobs go to others; those that fit no other are returned."""
        jobs = [self._jobs[job_id] for job_id, home in self._card_of.items() if home == card]
        for job in jobs:
            self.remove(job.id)
        for table in (self._kinds, self._waiting_seconds, self._busy_until, self._heaps):
            del table[card]
        return self.add(jobs, now)

    def load_seconds(self, card: str, now: float = 0.0) -> float:
        """What the card has still to do."""
        return max(0.0, self._busy_until[card] - now) + self._waiting_seconds[card]

    def _give(self, job: PendingJob, card: str) -> None:
        kind = self._kinds[card]
        self._jobs[job.id], self._card_of[job.id] = job, card
        self._waiting_seconds[card] += job.on[kind].seconds
        heapq.heappush(self._heaps[card].setdefault(job.plan, []), (sort_key(self._rule, job, kind), job.id))

    def _next_of(self, card: str, loaded_plan: str | None, fits: Callable[[PendingJob], bool]) -> PendingJob | None:
        best: tuple[SortKey, PendingJob] | None = None
        for plan, heap in list(self._heaps[card].items()):
            while heap and not self._is_current(heap[0], card):
                heapq.heappop(heap)
            if not heap:
                del self._heaps[card][plan]
                continue
            key, job_id = heap[0]
            job = self._jobs[job_id]
            key = with_preference(self._rule, key, job, loaded_plan)
            if (best is None or key < best[0]) and fits(job):
                best = key, job
        return best[1] if best else None

    def _is_current(self, entry: tuple[SortKey, int], card: str) -> bool:
        """Whether the job is in the card's share still, and as it was when it was put there."""
        key, job_id = entry
        if self._card_of.get(job_id) != card:
            return False
        return sort_key(self._rule, self._jobs[job_id], self._kinds[card]) == key

    def _from_others(self, card: str, now: float, fits: Callable[[PendingJob], bool]) -> PendingJob | None:
        """Of the card with the most to do, the job that would have waited longest, if it is done sooner here."""
        kind = self._kinds[card]
        for victim in sorted(self._kinds, key=lambda it: -self.load_seconds(it, now)):
            load_seconds = self.load_seconds(victim, now)
            jobs = [self._jobs[job_id] for _, job_id in self._entries(victim)]
            movable = [job for job in jobs if kind in job.on and job.on[kind].seconds < load_seconds and fits(job)]
            if movable:
                return max(movable, key=lambda job: sort_key(self._rule, job, kind))
        return None

    def _entries(self, card: str) -> list[tuple[SortKey, int]]:
        return [entry for heap in self._heaps[card].values() for entry in heap if self._is_current(entry, card)]

    def _longest_first(self, job: PendingJob) -> tuple[float, int]:
        return (-min((it.seconds for it in job.on.values()), default=0.0), job.id)
