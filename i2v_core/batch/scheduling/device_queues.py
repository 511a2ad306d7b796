"""Distributes jobs over several devices, so that the one that ends last ends as early as it can.

Longest processing time first (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969): the longest job goes to the
device that would be done with it first, of those that it fits. Each device takes its jobs in the policy's order; one
that has none left takes over from the device with the most to do. So the distribution follows what jobs really take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from .policy import PendingJob, Policy, PolicyQueue, sort_key


class DeviceQueues:
    """A queue of waiting jobs for each device. Times are in seconds, by any clock. Not thread-safe.

    Args:
        kinds: kind of each device, by the device's name; jobs have an estimate for each kind.
    """

    def __init__(self, kinds: Mapping[str, str], policy: Policy = Policy.WEIGHT) -> None:
        self._kinds = dict(kinds)
        self._policy = policy
        self._jobs: dict[int, PendingJob] = {}
        self._device_of: dict[int, str] = {}
        self._waiting_seconds = dict.fromkeys(kinds, 0.0)
        self._busy_until = dict.fromkeys(kinds, 0.0)
        self._queues = {device: PolicyQueue(policy, kind) for device, kind in kinds.items()}

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: int) -> bool:
        return job_id in self._jobs

    def add(self, jobs: Iterable[PendingJob], now: float = 0.0) -> list[PendingJob]:
        """Give each job to a device; return those that fit none."""
        rejected: list[PendingJob] = []
        for job in sorted(jobs, key=_longest_first):
            device = min(
                (device for device, kind in self._kinds.items() if kind in job.on),
                key=lambda device: self.load_seconds(device, now) + job.on[self._kinds[device]].seconds,
                default=None,
            )
            if device is None:
                rejected.append(job)
            else:
                self._jobs[job.id], self._device_of[job.id] = job, device
                self._waiting_seconds[device] += job.on[self._kinds[device]].seconds
                self._queues[device].add(job)
        return rejected

    def remove(self, job_id: int) -> None:
        job, device = self._jobs.pop(job_id), self._device_of.pop(job_id)
        self._waiting_seconds[device] -= job.on[self._kinds[device]].seconds
        self._queues[device].remove(job_id)

    def take(
        self,
        device: str,
        now: float = 0.0,
        loaded_plan: str | None = None,
        fits: Callable[[PendingJob], bool] = lambda _: True,
    ) -> PendingJob | None:
        """Remove and return the job that the device is to run next; None where there is none for it.

        Args:
            now: from then on the device counts as busy for the job's predicted seconds.
            loaded_plan: plan of the job that the device ran last.
            fits: whether a job fits what is free on the device now; asked about the first job of each plan.
        """
        job = self._queues[device].next(loaded_plan, fits) or self._from_others(device, now, fits)
        if job is None:
            return None
        self.remove(job.id)
        self._busy_until[device] = max(now, self._busy_until[device]) + job.on[self._kinds[device]].seconds
        return job

    def mark_idle(self, device: str, now: float) -> None:
        """Note that the device has nothing more to do, whatever was predicted."""
        self._busy_until[device] = now

    def lose(self, device: str, now: float = 0.0) -> list[PendingJob]:
        """Remove a device and give its jobs to others; return those that fit no other."""
        jobs = list(self._queues[device].jobs)
        for job in jobs:
            self.remove(job.id)
        for table in (self._kinds, self._waiting_seconds, self._busy_until, self._queues):
            del table[device]
        return self.add(jobs, now)

    def load_seconds(self, device: str, now: float = 0.0) -> float:
        """Predicted seconds until the device is done with all of its jobs."""
        return max(0.0, self._busy_until[device] - now) + self._waiting_seconds[device]

    def _from_others(self, device: str, now: float, fits: Callable[[PendingJob], bool]) -> PendingJob | None:
        """The job that would have waited longest, on the device with the most to do, if it is done sooner on this."""
        kind = self._kinds[device]
        for busiest in sorted(self._kinds, key=lambda it: -self.load_seconds(it, now)):
            load_seconds = self.load_seconds(busiest, now)
            jobs = self._queues[busiest].jobs
            movable = [job for job in jobs if kind in job.on and job.on[kind].seconds < load_seconds and fits(job)]
            if movable:
                return max(movable, key=lambda job: sort_key(self._policy, job, kind))
        return None


def _longest_first(job: PendingJob) -> tuple[float, int]:
    return (-min((it.seconds for it in job.on.values()), default=0.0), job.id)
