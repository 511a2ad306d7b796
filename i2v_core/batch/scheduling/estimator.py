"""Predicts a job: its plan, and the seconds of its stages, learned from jobs that have run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...families import Architecture
from ...memory.device import DeviceFacts
from ...planning.cost import sample_cost
from ...planning.margin import needed_bytes
from ...planning.plan import Plan, Stage
from ...planning.planner import make_plan
from ...planning.request import Budget, Request
from ...planning.suggestions import NothingFitsError
from ..jobs.job import JobSpec
from ..jobs.store import JobStore
from .policy import ResourceEstimate

_MEGAPIXEL = 1e6

# Seconds for a unit of work before anything has run: guesses, whose ratios matter more than their size. Timings of the
# first jobs of a model on a device replace them.
_GUESSED_SECONDS = {Stage.ENCODE: 1.0, Stage.SAMPLE: 0.25, Stage.DECODE: 0.15}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A job's plan on a device, and its predicted seconds by stage."""

    plan: Plan
    seconds: Mapping[Stage, float]

    @property
    def peak_bytes(self) -> int:
        """Bytes that must be free for the stage that needs most, its margin included."""
        return max(needed_bytes(it, self.plan.device) for it in self.plan.predictions)

    @property
    def resources(self) -> ResourceEstimate:
        return ResourceEstimate(seconds=sum(self.seconds.values()), peak_bytes=self.peak_bytes)


def plan_key(spec: JobSpec) -> str:
    """Key that is the same for jobs that are planned and run alike, whatever their picture, prompt, seed and steps."""
    parts = (spec.model_identity or spec.model, spec.size, spec.guidance, spec.precision, spec.allow_approximate)
    return " ".join(map(str, parts))


def work(plan: Plan, steps: int) -> dict[Stage, float]:
    """Work of each stage, in megapixels.

    Encode has those of the picture, decode those of all frames, sample those of all frames for each step and guidance
    branch, times the cost of the plan's settings.
    """
    size = plan.request.size
    picture = size.width_pixels * size.height_pixels / _MEGAPIXEL
    cost = 1 + sample_cost(plan.request, plan.sample)
    return {
        Stage.ENCODE: picture,
        Stage.SAMPLE: size.frames * picture * steps * plan.request.branches * cost,
        Stage.DECODE: size.frames * picture,
    }


class Estimator:
    """Plans jobs for one device and predicts their seconds. Plans are cached; timings are learned through the store."""

    def __init__(
        self,
        store: JobStore,
        facts: Callable[[Architecture], DeviceFacts],
        budget: Callable[[Architecture], Budget],
    ) -> None:
        self._store = store
        self._facts = facts
        self._budget = budget
        self._budgets: dict[Architecture, Budget] = {}
        self._plans: dict[str, Plan | NothingFitsError] = {}

    def estimate(self, spec: JobSpec, architecture: Architecture) -> Estimate:
        """Plan the job and predict its seconds. Raises `NothingFitsError` if no plan fits the budget."""
        plan = self._plan(spec, architecture)
        model_device, shape = _model_device_key(plan), plan_key(spec)
        learned = {stage: self._store.seconds_per_unit(model_device, shape, stage.value) for stage in Stage}
        rates = {stage: _GUESSED_SECONDS[stage] if rate is None else rate for stage, rate in learned.items()}
        return Estimate(plan=plan, seconds={stage: it * rates[stage] for stage, it in work(plan, spec.steps).items()})

    def learn(self, spec: JobSpec, plan: Plan, stage: Stage, seconds: float, *, steps: int) -> None:
        """Learn from a stage that has run; `steps` is the number of steps that were sampled."""
        done = work(plan, steps)[stage]
        if seconds > 0 and done > 0:
            self._store.learn(_model_device_key(plan), plan_key(spec), stage.value, work=done, seconds=seconds)

    def _plan(self, spec: JobSpec, architecture: Architecture) -> Plan:
        key = plan_key(spec)
        if key not in self._plans:
            self._plans[key] = self._plan_or_error(spec, architecture)
        plan = self._plans[key]
        if isinstance(plan, NothingFitsError):
            raise plan.with_traceback(None)
        return plan

    def _plan_or_error(self, spec: JobSpec, architecture: Architecture) -> Plan | NothingFitsError:
        # Read once: while stages run, their own memory would be missing.
        if architecture not in self._budgets:
            self._budgets[architecture] = self._budget(architecture)
        request = Request(
            architecture=architecture,
            size=spec.size,
            guidance=spec.guidance,
            precision=spec.precision,
            allow_approximate=spec.allow_approximate,
        )
        try:
            return make_plan(request, self._budgets[architecture], self._facts(architecture))
        except NothingFitsError as error:
            return error


def _model_device_key(plan: Plan) -> str:
    return f"{plan.request.architecture.fingerprint} on {plan.device.name}"
