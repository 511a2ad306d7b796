"""How many clips of one shape are sampled together: as many as are predicted to fit and to pay.

That is worth most where weights stream, which then come once for all clips, and where clips are so small that a device
waits for launches. What a prediction says is confirmed by a step: where clips take longer together than one after
another, so many are not put together again.
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

_MOST_UNASKED = 4
"""Those beyond would gain little more: of what streaming costs, a clip of four bears a quarter."""
_LEAST_GAIN = 0.02
"""Of the time of a clip: costs are shares that put ways in order, not exact to more than that."""
_CALL_SECONDS = 2e-4
"""What the launches of a layer call take: 20 to 40 kernels of 5 to 10 µs. An estimate, made before any card was at
hand."""


def batch_key(flight: RunningJob) -> Hashable:
    """The same for jobs whose clips can share the denoiser's calls. The flight has been encoded."""
    spec, conditioning = flight.spec, flight.conditioning
    assert conditioning is not None
    branches = (conditioning.positive, conditioning.negative or {})
    inputs = tuple(tuple((name, it.shape) for name, it in branch.items()) for branch in branches)
    return (plan_key(spec), spec.steps, spec.scheduler, flight.plan.sample.settings, inputs)


class BatchingPolicy:
    """Decides for one device, and remembers how long steps took there. For one thread.

    `most` is the user's number: so many are put together wherever they fit, whatever is predicted to pay. None: up to
    four, where it is.
    """

    def __init__(self, room: Callable[[], DeviceMemory], most: int | None) -> None:
        self._room = room
        self._most = _MOST_UNASKED if most is None else most
        self._asked = most is not None
        self._seconds: dict[tuple[Hashable, int], float] = {}
        self._slow: set[tuple[Hashable, int]] = set()
        self._plans: dict[Hashable, Plan | None] = {}

    def expected(self, flight: RunningJob) -> int:
        """How many would be sampled together, were there as many."""
        plan = self._largest(flight, self._most)
        return 1 if plan is None else plan.request.clips

    def plan(self, flight: RunningJob, ready: int) -> Plan | None:
        """For the flight and others of its shape, of which `ready` are there in all; None: it is sampled alone.

        That it is too until it is known how long a step takes alone, which the first job of a shape shows.
        """
        if (batch_key(flight), 1) not in self._seconds:
            return None
        return self._largest(flight, min(ready, self._most))

    def pays(self, kind: Hashable, clips: int, seconds: float) -> bool:
        """Whether a step of so many clips takes no longer than one after another, now that one took so long. A slow one
        may be another program's doing: only the second says that it does not pay.
        """
        step, alone = (kind, clips), self._seconds[kind, 1]
        if step not in self._seconds:
            if seconds > clips * alone and step not in self._slow:
                self._slow.add(step)
                return True
            self._seconds[step] = seconds
        pays = self._seconds[step] <= clips * alone
        if not pays:
            logger.info("a step of %d clips takes %.2f s, alone %.2f s", clips, self._seconds[step], alone)
        return pays

    def does_not_fit(self, kind: Hashable, clips: int) -> None:
        """So many ran out of memory."""
        self._seconds[kind, clips] = math.inf

    def sampled_alone(self, kind: Hashable, stepped_at: list[float]) -> None:
        """When the steps of a job of this shape ended, by a monotonic clock; the first warms up."""
        if len(stepped_at) > 1:
            seconds = [after - before for before, after in pairwise(stepped_at)]
            self._seconds[kind, 1] = statistics.median(seconds)

    def _largest(self, flight: RunningJob, most: int) -> Plan | None:
        found = (self._plan_of(flight, clips) for clips in range(most, 1, -1))
        return next((plan for plan in found if plan is not None), None)

    def _plan_of(self, flight: RunningJob, clips: int) -> Plan | None:
        """Where it fits what is free of others, and pays by what is known or predicted."""
        single = flight.plan
        key = (single.request, single.sample.settings, single.budget, clips)
        if key not in self._plans:
            self._plans[key] = planned_together(single, clips)
        plan = self._plans[key]
        if plan is None or needed_bytes(plan.prediction(Stage.SAMPLE), plan.device) > self._room().usable_bytes:
            return None
        kind = batch_key(flight)
        known, alone = self._seconds.get((kind, clips)), self._seconds.get((kind, 1))
        if known is not None and alone is not None:
            return plan if known <= clips * alone else None
        return plan if self._asked or predicted_gain(single, plan, alone) >= _LEAST_GAIN else None


def planned_together(plan: Plan, clips: int) -> Plan | None:
    """The plan with the fastest way to sample so many of its clips together that fits its budget, to the same result;
    None where none does.

    Where one clip leaves room to encode or decode others meanwhile, so do several.
    """
    request = replace(plan.request, clips=clips)
    limit = FitLimit.of(plan.budget, plan.device)
    limit = replace(limit, device_bytes=limit.device_bytes - _kept_for_others(plan))
    sample = cheapest_sample(request, plan.compute_dtype, limit, Approximation.of(plan.sample.settings))
    return None if sample is None else replace(plan, request=request, sample=sample)


def predicted_gain(single: Plan, together: Plan, step_seconds: float | None = None) -> float:
    """The share of a clip's sampling time that is predicted to be saved: by the cost model, and, where it is known how
    long a step takes alone, of launches.
    """
    gain = 1 - _cost_of_a_clip(together) / _cost_of_a_clip(single)
    if step_seconds is not None:
        saved = single.sample.prediction.layer_calls - together.sample.prediction.layer_calls / together.request.clips
        gain += saved * _CALL_SECONDS / step_seconds
    return gain


def _cost_of_a_clip(plan: Plan) -> float:
    """Its time, in units of the plain run's."""
    return 1 + sample_cost(plan.request, plan.sample)


def _kept_for_others(plan: Plan) -> int:
    sample, *others = (
        needed_bytes(plan.prediction(it), plan.device) for it in (Stage.SAMPLE, Stage.ENCODE, Stage.DECODE)
    )
    return max(others) if sample + max(others) <= plan.budget.usable_bytes else 0
