"""The number of clips sampled in one batch: as many as are predicted to fit and to pay.

A batch pays most where weights stream, since they are then transferred once for all clips, and where clips are so small
that the device waits for kernel launches. One step confirms a prediction: where a batch takes longer than its clips one
after another, batches of that size are not made again.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Hashable
from dataclasses import replace
from itertools import pairwise

from ...memory.device_memory import DeviceMemory
from ...planning.approximations import Approximation
from ...planning.cost import sample_cost
from ...planning.fit_limit import FitLimit
from ...planning.margin import needed_bytes
from ...planning.plan import Plan, Stage
from ...planning.search import cheapest_sample
from ..scheduling.estimator import plan_key
from .running_job import RunningJob

logger = logging.getLogger(__name__)

_AUTO_MAX_CLIPS = 4
"""More would gain little: in a batch of four, a clip bears a quarter of what streaming costs."""
_MIN_GAIN = 0.02
"""Share of a clip's time. Predicted costs put candidates in order; they are not exact to more than that."""
_LAUNCH_SECONDS = 2e-4
"""Time to launch one layer: 20 to 40 kernels of 5 to 10 µs. An estimate, made before any card could be measured."""


def batch_key(job: RunningJob) -> Hashable:
    """The same for encoded jobs whose clips can share denoiser calls."""
    spec, conditioning = job.spec, job.conditioning
    assert conditioning is not None
    branches = (conditioning.positive, conditioning.negative or {})
    inputs = tuple(tuple((name, it.shape) for name, it in branch.items()) for branch in branches)
    return (plan_key(spec), spec.steps, spec.scheduler, job.plan.sample.settings, inputs)


class BatchingPolicy:
    """Decides the batch size on one device, and remembers how long steps took there. Not thread-safe.

    Args:
        room: the device's memory as it is now.
        max_clips: the user's number: batches of that size are made wherever they fit, whether or not they are predicted
            to pay. None: up to four, where they are.
    """

    def __init__(self, room: Callable[[], DeviceMemory], max_clips: int | None) -> None:
        self._room = room
        self._max_clips = _AUTO_MAX_CLIPS if max_clips is None else max_clips
        self._is_user_choice = max_clips is not None
        self._step_seconds: dict[tuple[Hashable, int], float] = {}
        self._slow_once: set[tuple[Hashable, int]] = set()
        self._plans: dict[Hashable, Plan | None] = {}

    def expected_clips(self, job: RunningJob) -> int:
        """The batch size if enough matching jobs were ready."""
        plan = self._largest(job, self._max_clips)
        return 1 if plan is None else plan.request.clips

    def plan(self, job: RunningJob, ready: int) -> Plan | None:
        """The plan of the largest batch from `ready` matching jobs, this one included; None: it is sampled alone.

        The first job of a key always is: it shows how long a step takes alone.
        """
        if (batch_key(job), 1) not in self._step_seconds:
            return None
        return self._largest(job, min(ready, self._max_clips))

    def pays(self, key: Hashable, clips: int, seconds: float) -> bool:
        """Whether a step of a batch, which took so long, is no slower than its clips one after another.

        A first slow step may be another program's doing; only the second counts.
        """
        size, alone = (key, clips), self._step_seconds[key, 1]
        if size not in self._step_seconds:
            if seconds > clips * alone and size not in self._slow_once:
                self._slow_once.add(size)
                return True
            self._step_seconds[size] = seconds
        pays = self._step_seconds[size] <= clips * alone
        if not pays:
            logger.info("a step of %d clips takes %.2f s, alone %.2f s", clips, self._step_seconds[size], alone)
        return pays

    def record_out_of_memory(self, key: Hashable, clips: int) -> None:
        """Rules out batches of this size."""
        self._step_seconds[key, clips] = math.inf

    def record_single(self, key: Hashable, stepped_at: list[float]) -> None:
        """Learns how long a step takes alone, from the times at which a job's steps ended. The first warms up."""
        if len(stepped_at) > 1:
            seconds = [after - before for before, after in pairwise(stepped_at)]
            self._step_seconds[key, 1] = statistics.median(seconds)

    def _largest(self, job: RunningJob, max_clips: int) -> Plan | None:
        plans = (self._plan_of(job, clips) for clips in range(max_clips, 1, -1))
        return next((plan for plan in plans if plan is not None), None)

    def _plan_of(self, job: RunningJob, clips: int) -> Plan | None:
        """The plan of a batch of that size, if it fits beside other programs, and pays as far as is known."""
        single = job.plan
        key = (single.request, single.sample.settings, single.budget, clips)
        if key not in self._plans:
            self._plans[key] = plan_batch(single, clips)
        plan = self._plans[key]
        if plan is None or needed_bytes(plan.prediction(Stage.SAMPLE), plan.device) > self._room().usable_bytes:
            return None
        batch = batch_key(job)
        measured, alone = self._step_seconds.get((batch, clips)), self._step_seconds.get((batch, 1))
        if measured is not None and alone is not None:
            return plan if measured <= clips * alone else None
        return plan if self._is_user_choice or predicted_gain(single, plan, alone) >= _MIN_GAIN else None


def plan_batch(plan: Plan, clips: int) -> Plan | None:
    """The plan with the fastest settings to sample so many of its clips in one batch within its budget, to the same
    result; None where none fits.

    Where one clip leaves room to encode or decode other jobs at the same time, so does the batch.
    """
    request = replace(plan.request, clips=clips)
    limit = FitLimit.of(plan.budget, plan.device)
    limit = replace(limit, device_bytes=limit.device_bytes - _kept_for_other_stages_bytes(plan))
    sample = cheapest_sample(request, plan.compute_dtype, limit, Approximation.of(plan.sample.settings))
    return None if sample is None else replace(plan, request=request, sample=sample)


def predicted_gain(single: Plan, together: Plan, step_seconds: float | None = None) -> float:
    """The share of a clip's sampling time that a batch is predicted to save: by the cost model, and by fewer launches
    where it is known how long a step takes alone.
    """
    gain = 1 - _cost_per_clip(together) / _cost_per_clip(single)
    if step_seconds is not None:
        saved = single.sample.prediction.layer_calls - together.sample.prediction.layer_calls / together.request.clips
        gain += saved * _LAUNCH_SECONDS / step_seconds
    return gain


def _cost_per_clip(plan: Plan) -> float:
    """A clip's sampling time, relative to the plain run's."""
    return 1 + sample_cost(plan.request, plan.sample)


def _kept_for_other_stages_bytes(plan: Plan) -> int:
    sample, *others = (
        needed_bytes(plan.prediction(it), plan.device) for it in (Stage.SAMPLE, Stage.ENCODE, Stage.DECODE)
    )
    return max(others) if sample + max(others) <= plan.budget.usable_bytes else 0
