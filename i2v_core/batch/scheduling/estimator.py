"""What a job is predicted to take: its plan, and the seconds of its stages, learned from those that have run."""

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

# Seconds a unit of work before anything has run: guesses, whose ratios matter more than their size. The first jobs of a
# model on a device take their place.
_UNTAUGHT_SECONDS = {Stage.ENCODE: 1.0, Stage.SAMPLE: 0.25, Stage.DECODE: 0.15}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A job's plan on a device, and its predicted seconds by stage."""

    plan: Plan
    seconds: Mapping[Stage, float]

    @property
    def peak_bytes(self) -> int:
        """With its margin: what must be free for the binding stage."""
        return max(needed_bytes(it, self.plan.device) for it in self.plan.predictions)

    @property
    def resources(self) -> ResourceEstimate:
        return ResourceEstimate(seconds=sum(self.seconds.values()), peak_bytes=self.peak_bytes)


def plan_key(spec: JobSpec) -> str:
    """The same for jobs that are planned and run alike, whatever their picture, words, seed and steps."""
    parts = (spec.model_identity or spec.model, spec.size, spec.guidance, spec.precision, spec.allow_approximate)
    return " ".join(map(str, parts))


def work(plan: Plan, steps: int) -> dict[Stage, float]:
    """How much each stage has to do, in megapixels: of the picture, of frames times steps and guidance branches, with
    what the plan's way costs, and of frames.
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
    """Plans and predicted seconds of jobs on one device. Plans are remembered, seconds learned through the store."""

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
        """Raises `NothingFitsError` where the job fits the budget in no way."""
        plan = self._plan(spec, architecture)
        pairing = _model_device_key(plan)
        rates = {stage: self._store.seconds_per_unit(pairing, plan_key(spec), stage.value) for stage in Stage}
        known = {stage: _UNTAUGHT_SECONDS[stage] if rate is None else rate for stage, rate in rates.items()}
        return Estimate(plan=plan, seconds={stage: it * known[stage] for stage, it in work(plan, spec.steps).items()})

    def learn(self, spec: JobSpec, plan: Plan, stage: Stage, seconds: float, *, steps: int) -> None:
        """What a stage of the job took; `steps` are those that were sampled."""
        done = work(plan, steps)[stage]
        if seconds > 0 and done > 0:
            self._store.learn(_model_device_key(plan), plan_key(spec), stage.value, work=done, seconds=seconds)

    def _plan(self, spec: JobSpec, architecture: Architecture) -> Plan:
        name = plan_key(spec)
        if name not in self._plans:
            self._plans[name] = self._made(spec, architecture)
        found = self._plans[name]
        if isinstance(found, NothingFitsError):
            raise found.with_traceback(None)
        return found

    def _made(self, spec: JobSpec, architecture: Architecture) -> Plan | NothingFitsError:
        # Read once: when stages run, what they hold would be missing.
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
